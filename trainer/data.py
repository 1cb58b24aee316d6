"""Token files and batches.

A batch is a function of (seed, split, step, micro-batch index). There is no state, so a run can be resumed, and spread
over any number of ranks, without saving a position in the data.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.distributed import World
from trainer.errors import UserError, first_line
from trainer.files import INCOMPLETE, open_regular, parse_json, read_text
from trainer.settings import Settings, domain
from trainer.streams import HELD_OUT, stream_seed
from trainer.structure import brief, check_extent

DATA = Path(__file__).parent.parent / "data"
SPLITS = ("train", "val")
EVAL_SEED = 0  # of the validation batches, the same for every run of a dataset
CHUNK = 1 << 24  # tokens read at a time
GPT2_VOCAB_SIZE = 50304  # of datasets without a meta file, as in nanoMoE: 50257, padded to a multiple of 64

Batch = tuple[Tensor, Tensor]  # inputs and targets, [batch_size, block_size] int64 each


class TokenData:
    """train.bin and val.bin (uint16) of a dataset, and its meta file.

    Raises UserError if a file is missing, unreadable or too short.
    """

    def __init__(self, folder: Path, block_size: int):
        self.folder = folder
        self.block_size = block_size
        self.meta = read_meta(folder)
        self.vocab_size: int = self.meta.get("vocab_size", GPT2_VOCAB_SIZE)
        self.stats: dict[str, os.stat_result] = {}
        self.files: dict[str, BinaryIO] = {}
        self.tokens = {split: self._open(split) for split in SPLITS}
        if read_meta(folder) != self.meta:  # meta.json is replaced before the token files
            raise UserError(f"{folder} was prepared again while it was being opened; start again")

    def _open(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        try:
            self.files[split] = f = open_regular(path)
            self.stats[split] = stat = os.fstat(f.fileno())  # of the open file, even if it is replaced later
            size = stat.st_size
            tokens = np.memmap(f, dtype=np.uint16, mode="r") if size > 1 and size % 2 == 0 else None
        except OSError as e:
            prepare = self.folder / "prepare.py"
            hint = f"run {prepare} first" if prepare.exists() else "a dataset is train.bin and val.bin"
            raise UserError(f"cannot read {path}: {e.strerror}; {hint}") from None
        if tokens is None:
            raise UserError(f"{path} holds {size} bytes, which is not a file of 16-bit token ids; prepare it again")
        if len(tokens) <= self.block_size:
            raise UserError(f"{path} holds {len(tokens)} tokens, too few for block_size={self.block_size}")
        return tokens

    def fingerprint(self, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """For each file: SHA-256, size in bytes and modification time.

        Reads every token once and checks it against the vocabulary, and the files against the SHA-256 in meta.json, if
        there is one. known: earlier fingerprints; a file of the same size and modification time is not read again.
        Raises UserError for a token outside the vocabulary, or a file that meta.json does not describe.
        """
        found = {}
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            stat = {"bytes": self.stats[split].st_size, "mtime_ns": self.stats[split].st_mtime_ns}
            before = (known or {}).get(path.name)
            if isinstance(before, dict) and stat.items() <= before.items() and "sha256" in before:
                found[path.name] = before
                continue
            found[path.name] = stat | {"sha256": self._check_tokens(split)}
            expected = self.meta.get("sha256")
            expected = expected.get(path.name) if isinstance(expected, dict) else None
            if expected is not None and expected != found[path.name]["sha256"]:
                raise UserError(f"{path} is not the file that {self.folder / 'meta.json'} describes; prepare it again")
        return found

    def _check_tokens(self, split: str) -> str:
        """Check every token against the vocabulary. Returns the file's SHA-256."""
        path, tokens = self.folder / f"{split}.bin", self.tokens[split]
        sha256 = hashlib.sha256()
        with tqdm(total=tokens.nbytes, desc=f"checking {path}", unit="B", unit_scale=True, delay=2, leave=False) as bar:
            for start in range(0, len(tokens), CHUNK):
                self._check_size(split)
                chunk = tokens[start : start + CHUNK]
                self._check_vocabulary(path, chunk.max())
                sha256.update(chunk.data)
                bar.update(chunk.nbytes)
        return sha256.hexdigest()

    def _check_size(self, split: str) -> None:
        """Raise UserError if the file was shortened: reading what is missing would end the process by SIGBUS."""
        size, before = os.fstat(self.files[split].fileno()).st_size, self.stats[split].st_size
        if size != before:
            path = self.folder / f"{split}.bin"
            raise UserError(f"{path} has changed from {before} to {size} bytes while it was read: restore the file")

    def _check_vocabulary(self, path: Path, largest: int) -> None:
        if largest >= self.vocab_size:
            raise UserError(f"{path} holds the token id {largest}, beyond the vocabulary of {self.vocab_size}")

    def batch(self, split: str, seed: int, step: int, micro: int, batch_size: int) -> Batch:
        """Inputs and targets, [batch_size, block_size] int64 each, on the CPU.

        micro is the micro-batch's index within the step, over all ranks. Raises UserError if the file was shortened.
        """
        self._check_size(split)
        tokens = self.tokens[split]
        entropy = np.random.SeedSequence([seed, SPLITS.index(split), step, micro])
        # raw output of a counter-based generator: unlike Generator's methods, it is the same in all versions of numpy
        starts = np.random.Philox(entropy).random_raw(batch_size) % np.uint64(len(tokens) - self.block_size)
        rows = tokens[starts.astype(np.int64)[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        self._check_vocabulary(self.folder / f"{split}.bin", rows.max())
        ids = torch.from_numpy(rows)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


Texts = dict[str, TokenData]  # the datasets of a run by name, that of validation first


class BatchLoader:
    """The batches of a run, on the device. On a GPU a thread prepares the next batch during a step.

    A step's micro-batches are dealt to the ranks in turn, so its batch does not depend on their number. On a CPU there
    is no thread: it would compete with training.

    Args:
        texts: the token files.
        schedule: (dataset, first step) of each phase of training.
        seed: of the run.
        batch_size: sequences per micro-batch.
        micro_batches: per step, over all ranks.
        device: where the batches go.
        world: the ranks.
    """

    def __init__(
        self,
        texts: Texts,
        schedule: Sequence[tuple[str, int]],
        seed: int,
        batch_size: int,
        micro_batches: int,
        device: torch.device,
        world: World,
    ):
        self.texts, self.schedule, self.seed, self.batch_size, self.device = texts, schedule, seed, batch_size, device
        self.indices = range(world.rank, micro_batches, world.world_size)  # of this rank's micro-batches
        self._pool = ThreadPoolExecutor(1, "batches") if device.type == "cuda" else None
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def training(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step. The first step is 0."""
        for index in self.indices:
            following = (step, index + self.indices.step) if index != self.indices[-1] else (step + 1, self.indices[0])
            if self._next is not None and self._next[0] == (step, index):
                batch = self._next[1].result()
            else:
                batch = self._load_training(self.seed, step, index)
            if self._pool is not None:
                self._next = following, self._pool.submit(self._load_training, self.seed, *following)
            yield self._to_device(batch)

    def validation(self, index: int, dataset: str | None = None) -> Batch:
        """Validation batch `index` of a dataset, the same for every run; None: of the first dataset."""
        data = self.texts[dataset] if dataset else next(iter(self.texts.values()))
        return self._to_device(self._load(data, "val", EVAL_SEED, 0, index))

    def held_out(self, step: int, index: int) -> Batch:
        """Batch `index` of the training text of a step that is drawn apart from the training batches."""
        return self._to_device(self._load_training(stream_seed(self.seed, HELD_OUT), step, index))

    def _load_training(self, seed: int, step: int, index: int) -> Batch:
        dataset = next(name for name, first in reversed(self.schedule) if first <= step)
        return self._load(self.texts[dataset], "train", seed, step, index)

    def _load(self, data: TokenData, split: str, seed: int, step: int, index: int) -> Batch:
        x, y = data.batch(split, seed, step, index, self.batch_size)
        return (x.pin_memory(), y.pin_memory()) if self.device.type == "cuda" else (x, y)

    def _to_device(self, batch: Batch) -> Batch:
        x, y = batch
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def open_dataset(name: str, block_size: int) -> TokenData:
    """Open the dataset `name` under data/, or a path.

    If a dataset under data/ is missing or incomplete, and its prepare.py defines prepare(..., unless), it is prepared.
    """
    folder = DATA / name
    if name == folder.name and not is_prepared(folder) and defines_prepare(folder / "prepare.py"):
        load_prepare(folder / "prepare.py").prepare(folder, unless=lambda: is_prepared(folder))
    if not os.path.isdir(folder) and os.path.isdir(name):
        folder = Path(name)
    if not os.path.isdir(folder):
        there = sorted(p.parent.name for p in DATA.glob("*/prepare.py"))
        raise UserError(f"no folder {folder} for dataset={name!r}; there are {', '.join(there)}, or give a path")
    return TokenData(folder, block_size)


def open_texts(s: Settings) -> Texts:
    """The datasets of a run's schedule, by name. Raises UserError if one cannot be read, or has another vocabulary."""
    texts = {name: open_dataset(name, s.block_size) for name, _ in s.schedule}
    first = texts[s.dataset]
    for name, data in texts.items():
        same = ("vocab_size", "tokenizer")
        ours, theirs = ([d.meta.get(key) for key in same] for d in (first, data))
        if ours != theirs:
            raise UserError(
                f"data_schedule: {name} has the tokenizer {theirs[1]!r} and a vocabulary of {theirs[0]}, {s.dataset} "
                f"{ours[1]!r} and {ours[0]}: prepare them with the same tokenizer"
            )
    return texts


def fingerprint(texts: Texts, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """`TokenData.fingerprint` of all datasets. Files of all but the first are named as 'prose/train.bin'."""
    found: dict[str, dict[str, Any]] = {}
    for i, (dataset, data) in enumerate(texts.items()):
        prefix = f"{domain(dataset)}/" if i else ""
        ours = {name.removeprefix(prefix): file for name, file in (known or {}).items() if name.startswith(prefix)}
        found |= {prefix + name: file for name, file in data.fingerprint(ours).items()}
    return found


def is_prepared(folder: Path) -> bool:
    """Whether there is a meta.json that does not mark the dataset as incomplete."""
    try:
        return INCOMPLETE not in parse_json(read_text(folder / "meta.json"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):  # read_meta reports what is wrong
        return True


def defines_prepare(path: Path) -> bool:
    """Whether a prepare.py defines prepare(..., unless). It is not run: nanoGPT's scripts download when imported."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    functions = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "prepare")
    return any(argument.arg == "unless" for function in functions for argument in function.args.args)


def load_prepare(path: Path) -> Any:
    """Import a dataset's prepare.py."""
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json, or else nanoGPT's meta.pkl; empty without either. Raises UserError if it is damaged."""
    path = folder / "meta.json"
    try:
        if path.exists():
            meta = parse_json(read_text(path))
        elif (path := folder / "meta.pkl").exists():
            with open_regular(path) as f:
                meta = _PlainUnpickler(f).load()
            check_extent(meta)
        else:
            return {}
    except Exception as e:  # damaged pickles raise many kinds of exceptions
        raise UserError(f"{path} cannot be read ({first_line(e)}); prepare the dataset again") from None
    if isinstance(meta, dict) and INCOMPLETE in meta:
        raise UserError(
            f"{path}: the dataset's preparation was interrupted; prepare it again, or wait if it is in progress"
        )
    if isinstance(meta, dict) and meta.get("dtype", "uint16") != "uint16":
        raise UserError(f"{path} says that token ids are {brief(meta['dtype'])}; only uint16 is read")
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 65536:
        raise UserError(f"{path} must hold a vocab_size between 1 and 65536, not {brief(size)}")
    return meta


# pickle.Unpickler, in C, prints a SystemError if the file ends within a bytearray
class _PlainUnpickler(pickle._Unpickler):
    """Unpickles dicts, lists, strings and numbers. A pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain containers are allowed")
