"""Checkpoints: everything a run needs to go on, readable without unpickling code, whole or not there.

In out_dir: ckpt.pt, the newest; ckpt_previous.pt, the one before; ckpt_best.pt, that of the lowest validation loss.
Each is torch's zip file with the SHA-256 of its content in the archive's comment, so a copy can be checked wherever it
lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.files import PARTIAL, twin, whole_file

NAME, PREVIOUS, BEST = "ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt"
DAMAGED = ".damaged"  # how the name of a checkpoint ends that was found damaged and kept aside
NEEDED = {"model": dict, "optimizer": dict, "model_args": dict, "iter_num": int}
DIGEST = b"sha256:"
COMMENT_LENGTH = 2  # a zip file ends with the length of its comment, here 0 before the digest is added


class Damaged(Exception):
    """The message says what is wrong with the file."""


class Keeper:
    """Saves a run's checkpoints without holding it up: the state is copied, a thread writes the copy.

    A save that fails is told, leaves the older checkpoints as they are, and is tried again at the next one.

    Args:
        out_dir: the run's folder.
        say: takes a line for the person.
        before: called in the thread before a checkpoint takes its place; what it raises makes the save fail.
        interval: save every so many steps; 0: not by steps.
        minutes: save when the last save is so long ago; 0: not by time.
    """

    def __init__(
        self, out_dir: Path, say: Callable[[str], None], before: Callable[[], None], interval: int, minutes: float
    ):
        self.out_dir = out_dir
        self.say = say
        self.before = before
        self.interval = interval
        self.seconds = minutes * 60 or float("inf")
        self.saved_step: int | None = None  # of the newest checkpoint that this run wrote
        self.failure: str | None = None  # why the last save failed
        self.thread: threading.Thread | None = None
        self.wanted = False
        self.last_save = time.monotonic()
        for left_over in out_dir.glob(f"*.pt.*{PARTIAL}"):  # of a process that was killed while it saved
            left_over.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """A checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    def due(self, step: int) -> bool:
        """Whether it is time to save. A save that falls due while another is being written waits for it."""
        by_step = self.interval > 0 and step % self.interval == 0
        self.wanted |= by_step or time.monotonic() - self.last_save >= self.seconds
        return self.wanted and not self.busy

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Copy the state and begin to write it, after a save that is under way. best: it is ckpt_best.pt as well."""
        self.wait()
        self.wanted, self.last_save = False, time.monotonic()
        self.thread = threading.Thread(target=self._write, args=(copied(state), best), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until what is being written is written."""
        if self.thread is not None:
            self.thread.join()

    def _write(self, state: dict[str, Any], best: bool) -> None:
        step = state["iter_num"]
        try:
            name = not_finite(state)
            if name is not None:
                raise ValueError(f"{name} holds numbers that are not finite")
            self.before()
            write(self.out_dir, state, best)
        except Exception as e:  # whatever it is, training goes on
            reason = (e.strerror if isinstance(e, OSError) else None) or first_line(e) or type(e).__name__
            if self.failure is None:
                self.say(
                    f"cannot save step {step} in {self.out_dir / NAME}: {reason}; older checkpoints are untouched, "
                    "training goes on unprotected and tries again at the next save"
                )
            self.failure = reason
            return
        if self.failure is not None:
            self.say(f"saved step {step} in {self.out_dir / NAME}: protected again")
        self.saved_step, self.failure = step, None


def write(out_dir: Path, state: dict[str, Any], best: bool = False) -> None:
    """Make `state` out_dir's newest checkpoint, and the newest so far the previous one. Raises OSError."""
    path = out_dir / NAME
    with whole_file(path) as f:
        hashing = _Hashing(f)
        torch.save(state, hashing)
        digest = DIGEST + hashing.sha256.hexdigest().encode()
        f.seek(-COMMENT_LENGTH, os.SEEK_END)
        f.write(len(digest).to_bytes(COMMENT_LENGTH, "little") + digest)
        f.flush()
        os.fsync(f.fileno())
        # both before the newest takes its place: a kill in between loses neither
        if best:
            twin(Path(f.name), out_dir / BEST)
        if path.exists():
            twin(path, out_dir / PREVIOUS)


class _Hashing:
    """A file for torch.save that hashes what passes through."""

    def __init__(self, f: BinaryIO):
        self.f = f
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.f.write(content)

    def flush(self) -> None:
        self.f.flush()


def exists(out_dir: Path) -> bool:
    """Whether there is any checkpoint in out_dir, whole or not."""
    return any(os.path.exists(out_dir / name) for name in (NAME, PREVIOUS, BEST))


def newest(out_dir: Path) -> tuple[dict[str, Any], list[str], list[Path]]:
    """The newest whole checkpoint in out_dir, lines on the ones that were passed over, and those files.

    Raises UserError if there is none, or one is no checkpoint or carries code.
    """
    notes, damaged = [], []
    for name in (NAME, PREVIOUS, BEST):
        path = out_dir / name
        try:
            checkpoint = load(path)
        except FileNotFoundError:
            continue
        except Damaged as e:
            damaged.append(path)
            notes.append(f"{path} is damaged: {e}")
            continue
        if name != NAME:
            notes.append(f"going on from {path}, step {checkpoint['iter_num']}")
        return checkpoint, notes, damaged
    if notes:
        raise UserError("; ".join(notes) + "; no other checkpoint is there: start anew with another --out_dir")
    raise UserError(f"there is no checkpoint in {out_dir}")


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, tensors on the CPU.

    Raises FileNotFoundError, Damaged, or UserError if it is another file or carries code.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    try:
        _check_digest(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e) or "global" in str(e):
            raise UserError(f"{path} is refused: it names code, and a checkpoint holds tensors and numbers") from None
        raise Damaged("it is cut or no checkpoint") from None
    except Exception:  # damaged bytes raise nearly anything
        raise Damaged("it is cut or no checkpoint") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is no training checkpoint, but a {type(checkpoint).__name__}")
    missing = NEEDED.keys() - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is no training checkpoint: it lacks {', '.join(sorted(missing))}")
    for name, kind in NEEDED.items():
        if not isinstance(checkpoint[name], kind):
            raise UserError(f"{path} is no training checkpoint: its {name} is a {type(checkpoint[name]).__name__}")
    return checkpoint


def without_tensors(path: Path) -> dict[str, Any]:
    """The checkpoint in a file for its numbers and names: tensors are mapped, not read, and the digest is not checked.

    Raises FileNotFoundError or Damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception:  # damaged bytes raise nearly anything
        raise Damaged("it is cut or no checkpoint") from None
    if not isinstance(saved, dict):
        raise Damaged("it is no checkpoint")
    return saved


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Written by this program, not by nanoMoE."""
    return "random" in checkpoint


def _check_digest(path: Path) -> None:
    """Compare the file with the digest in it, or with the archive's own checksums. Raises Damaged if they differ."""
    trailer = len(DIGEST) + 2 * hashlib.sha256().digest_size
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 2 * trailer))
        tail = f.read()
        end = tail[-trailer:]
        if not end.startswith(DIGEST):
            if DIGEST in tail:
                raise Damaged("its end is missing")
            if zipfile.is_zipfile(path):
                _check_crc(path)
            return
        f.seek(0)
        sha256, left = hashlib.sha256(), size - trailer - COMMENT_LENGTH
        while left > 0:
            content = f.read(min(left, 1 << 20))
            sha256.update(content)
            left -= len(content)
        sha256.update(bytes(COMMENT_LENGTH))
    if end != DIGEST + sha256.hexdigest().encode():
        raise Damaged("its content does not match its digest")


def _check_crc(path: Path) -> None:
    """The zip file's own checksums, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as f:
            bad = f.testzip()
    except Exception as e:
        raise Damaged(first_line(e)) from None
    if bad is not None:
        raise Damaged(f"{bad} in it does not match its checksum")


def copied(value: Any, seen: dict | None = None) -> Any:
    """A copy of nested dicts and lists with all tensors on the CPU; what was one tensor under two names stays one."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if value.numel() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: copied(v, seen) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v, seen) for v in value)
    return value


def not_finite(value: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds a NaN or an infinity."""
    if isinstance(value, Tensor):
        return name if value.is_floating_point() and not value.isfinite().all() else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (not_finite(v, f"{name}/{key}" if name else str(key)) for key, v in items)
    return next((bad for bad in found if bad is not None), None)


def set_aside(paths: list[Path]) -> None:
    """Rename damaged checkpoints, so that nothing takes their place and none takes a good one's."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + DAMAGED))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's global generators, which dropout and router noise draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
