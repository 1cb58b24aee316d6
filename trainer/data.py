"""Token files and the batches cut from them.

A batch is a function of (seed, split, step, micro-batch index): no generator holds state, so a run can be resumed or
spread over ranks without remembering where its data stood.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.errors import UserError, first_line
from trainer.files import INCOMPLETE, parse_json, read_text

DATA = Path(__file__).parent.parent / "data"
SPLITS = ("train", "val")
EVAL_SEED = 0  # of the validation batches, the same for every run of a dataset
CHUNK = 1 << 24  # tokens read at a time
GPT2_VOCAB_SIZE = 50304  # 50257, padded to a multiple of 64: what nanoMoE takes where a dataset has no meta file


class TokenData:
    """train.bin and val.bin (uint16) of a dataset, with what its meta file says.

    Raises UserError if a file is missing, unreadable or shorter than a batch needs.
    """

    def __init__(self, folder: Path, block_size: int):
        self.folder = folder
        self.block_size = block_size
        self.meta = read_meta(folder)
        self.vocab_size: int = self.meta.get("vocab_size", GPT2_VOCAB_SIZE)
        self.stats: dict[str, os.stat_result] = {}
        self.tokens = {split: self._open(split) for split in SPLITS}
        if read_meta(folder) != self.meta:  # meta.json changes before the token files do
            raise UserError(f"{folder} was prepared again while it was opened; start again")

    def _open(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        try:
            with path.open("rb") as f:
                self.stats[split] = stat = os.fstat(f.fileno())  # of this file, whatever replaces it later
                size = stat.st_size
                tokens = np.memmap(f, dtype=np.uint16, mode="r") if size > 1 and size % 2 == 0 else None
        except OSError as e:
            prepare = self.folder / "prepare.py"
            hint = f"run {prepare} first" if prepare.exists() else "a dataset is train.bin and val.bin"
            raise UserError(f"cannot read {path}: {e.strerror}; {hint}") from None
        if tokens is None:
            raise UserError(f"{path} holds {size} bytes, which is no file of 16-bit token ids; prepare it again")
        if len(tokens) <= self.block_size:
            raise UserError(f"{path} holds {len(tokens)} tokens, too few for block_size={self.block_size}")
        return tokens

    def fingerprint(self, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """What tells these files from others: for each its sha256, size in bytes and time of change.

        Reads every token once and checks that it is in the vocabulary, and the files against meta.json where that has
        their sha256. known: an earlier fingerprint; a file of the same size and time is not read again.
        Raises UserError for a token beyond the vocabulary, or a file that meta.json does not describe.
        """
        found = {}
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            stat = self.stats[split]
            look = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            before = (known or {}).get(path.name)
            if isinstance(before, dict) and look.items() <= before.items() and "sha256" in before:
                found[path.name] = before
                continue
            found[path.name] = look | {"sha256": self._read_through(path, self.tokens[split])}
            claimed = self.meta.get("sha256")
            claimed = claimed.get(path.name) if isinstance(claimed, dict) else None
            if claimed is not None and claimed != found[path.name]["sha256"]:
                raise UserError(f"{path} is not the file that {self.folder / 'meta.json'} describes; prepare it again")
        return found

    def _read_through(self, path: Path, tokens: np.ndarray) -> str:
        """The file's sha256, with every token checked."""
        sha256 = hashlib.sha256()
        # shown only where it takes a while
        with tqdm(total=tokens.nbytes, desc=f"checking {path}", unit="B", unit_scale=True, delay=2, leave=False) as bar:
            for start in range(0, len(tokens), CHUNK):
                chunk = tokens[start : start + CHUNK]
                self._check_vocabulary(path, chunk.max())
                sha256.update(chunk)
                bar.update(chunk.nbytes)
        return sha256.hexdigest()

    def _check_vocabulary(self, path: Path, largest: int) -> None:
        if largest >= self.vocab_size:
            raise UserError(f"{path} holds the token id {largest}, beyond the vocabulary of {self.vocab_size}")

    def batch(self, split: str, seed: int, step: int, micro: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [batch_size, block_size] int64 each, on the CPU.

        micro is the micro-batch's index within the step, over all ranks.
        """
        tokens = self.tokens[split]
        entropy = np.random.SeedSequence([seed, SPLITS.index(split), step, micro])
        # raw words of a counter-based generator: unlike Generator's methods, fixed across numpy's versions
        starts = np.random.Philox(entropy).random_raw(batch_size) % np.uint64(len(tokens) - self.block_size)
        rows = tokens[starts.astype(np.int64)[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        self._check_vocabulary(self.folder / f"{split}.bin", rows.max())
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Prefetcher:
    """Batches, the next one prepared in a thread while a GPU works on this one.

    A batch depends on its place only, so nothing is lost where another one than the announced is asked for. On a CPU
    the thread would take time from training: there batches are made when they are asked for.
    """

    def __init__(self, data: TokenData, batch_size: int, device: torch.device):
        self.data, self.batch_size, self.device = data, batch_size, device
        self.pool = ThreadPoolExecutor(1, "batches") if device.type == "cuda" else None
        self.announced: tuple[tuple, Future | None] = ((), None)

    def batch(self, *place, following: tuple | None = None) -> tuple[Tensor, Tensor]:
        """The batch at `place` (split, seed, step, micro-batch) on the device; `following` is the place of the next."""
        key, future = self.announced
        x, y = future.result() if future is not None and key == place else self._make(*place)
        if self.pool is not None and following is not None:
            self.announced = following, self.pool.submit(self._make, *following)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _make(self, *place) -> tuple[Tensor, Tensor]:
        x, y = self.data.batch(*place, self.batch_size)
        return (x.pin_memory(), y.pin_memory()) if self.device.type == "cuda" else (x, y)


def open_dataset(name: str, block_size: int) -> TokenData:
    """The dataset `name` under data/ (or a path); 'stdlib' is prepared first if it is not there or not whole."""
    folder = DATA / name
    if name == "stdlib" and not is_prepared(folder):
        load_prepare(folder / "prepare.py").prepare(folder, unless=lambda: is_prepared(folder))
    if not os.path.isdir(folder) and os.path.isdir(name):
        folder = Path(name)
    if not os.path.isdir(folder):
        there = sorted(p.parent.name for p in DATA.glob("*/prepare.py"))
        raise UserError(f"no folder {folder} for dataset={name!r}; there are {', '.join(there)}, or give a path")
    return TokenData(folder, block_size)


def is_prepared(folder: Path) -> bool:
    """Whether a meta.json is there that does not say that the dataset is incomplete."""
    try:
        return INCOMPLETE not in parse_json(read_text(folder / "meta.json"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):  # read_meta says what is wrong with it
        return True


def load_prepare(path: Path) -> Any:
    """A dataset's prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says, or nanoGPT's meta.pkl, or nothing. Raises UserError if it is no such file."""
    path = folder / "meta.json"
    try:
        if path.exists():
            meta = parse_json(read_text(path))
        elif (path := folder / "meta.pkl").exists():
            with path.open("rb") as f:
                meta = _PlainUnpickler(f).load()
        else:
            return {}
    except Exception as e:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} cannot be read ({first_line(e)}); prepare the dataset again") from None
    if isinstance(meta, dict) and INCOMPLETE in meta:
        raise UserError(
            f"{path}: the dataset's preparation was interrupted; prepare it again, or wait if it is under way"
        )
    if isinstance(meta, dict) and meta.get("dtype", "uint16") != "uint16":
        raise UserError(f"{path} says that token ids are {meta['dtype']}; only uint16 is read")
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 65536:
        raise UserError(f"{path} must hold a vocab_size between 1 and 65536, not {size!r}")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    """Admits dicts, lists, strings and numbers. A pickle that names a class or function is refused and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain containers are admitted")
