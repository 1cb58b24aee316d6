"""Checkpoint files. Writing is atomic, and loading never executes code.

In out_dir: ckpt.pt, the newest; ckpt_previous.pt, the one before it; ckpt_best.pt, the one with the lowest validation
loss. Each is torch's zip file with the SHA-256 of its content in the archive's comment, so every copy can be verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from trainer.errors import UserError, first_line
from trainer.files import PARTIAL, atomic_write, link_or_copy

NAME, PREVIOUS, BEST = "ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt"
DAMAGED = ".damaged"  # suffix of a damaged checkpoint that was set aside
NEEDED = {"model": dict, "optimizer": dict, "model_args": dict, "iter_num": int}
DIGEST = b"sha256:"
COMMENT_LENGTH = 2  # bytes at the end of a zip file that hold the length of its comment


class Damaged(Exception):
    """A file that is incomplete or changed. The message says how."""


def write(out_dir: Path, state: dict[str, Any], is_best: bool = False) -> None:
    """Write `state` as the newest checkpoint in out_dir; the newest so far becomes the previous. Raises OSError."""
    path = out_dir / NAME
    with atomic_write(path) as f:
        hashing = _Hashing(f)
        try:
            torch.save(state, cast(BinaryIO, hashing))  # it needs only write and flush
        except RuntimeError as e:  # torch fails to close its archive after a write has failed
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None
        digest = DIGEST + hashing.sha256.hexdigest().encode()
        f.seek(-COMMENT_LENGTH, os.SEEK_END)
        f.write(len(digest).to_bytes(COMMENT_LENGTH, "little") + digest)
        f.flush()
        os.fsync(f.fileno())
        # before ckpt.pt is replaced, so that a kill in between loses neither
        if is_best:
            link_or_copy(Path(f.name), out_dir / BEST)
        if path.exists():
            link_or_copy(path, out_dir / PREVIOUS)


class _Hashing:
    """A file for torch.save that hashes what is written."""

    def __init__(self, f: BinaryIO):
        self.f = f
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.f.write(content)

    def flush(self) -> None:
        self.f.flush()


def exists(out_dir: Path) -> bool:
    """Whether out_dir has a checkpoint, damaged or not."""
    return any(os.path.exists(out_dir / name) for name in (NAME, PREVIOUS, BEST))


def newest(out_dir: Path) -> tuple[dict[str, Any], list[str], list[Path]]:
    """The newest intact checkpoint in out_dir, notes on the damaged ones, and the paths of those.

    Raises UserError if there is none, or if a file is not a checkpoint or names code.
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
            notes.append(f"continuing from {path}, step {checkpoint['iter_num']}")
        return checkpoint, notes, damaged
    if notes:
        raise UserError("; ".join(notes) + "; there is no other checkpoint: start again with another --out_dir")
    raise UserError(f"there is no checkpoint in {out_dir}")


def load(path: Path) -> dict[str, Any]:
    """Load the checkpoint in a file, tensors on the CPU.

    Raises FileNotFoundError, Damaged, or UserError if the file is not a checkpoint or names code.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # opening a named pipe waits
        raise UserError(f"cannot read {path}: it is not a file")
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
            raise UserError(
                f"{path} is refused: it names code, and a checkpoint holds only tensors and numbers"
            ) from None
        raise Damaged("it is incomplete or not a checkpoint") from None
    except Exception:  # damaged bytes raise many kinds of exceptions
        raise Damaged("it is incomplete or not a checkpoint") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a training checkpoint but a {type(checkpoint).__name__}")
    missing = NEEDED.keys() - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is not a training checkpoint: it lacks {', '.join(sorted(missing))}")
    for name, kind in NEEDED.items():
        if not isinstance(checkpoint[name], kind):
            raise UserError(f"{path} is not a training checkpoint: its {name} is a {type(checkpoint[name]).__name__}")
    return checkpoint


def without_tensors(path: Path) -> dict[str, Any]:
    """Load a checkpoint for its numbers and names. Tensors are mapped, not read, and the digest is not verified.

    Raises FileNotFoundError or Damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception:  # damaged bytes raise many kinds of exceptions
        raise Damaged("it is incomplete or not a checkpoint") from None
    if not isinstance(saved, dict):
        raise Damaged("it is not a checkpoint")
    return saved


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Whether this program wrote the checkpoint, and not nanoMoE."""
    return "random" in checkpoint


def _check_digest(path: Path) -> None:
    """Verify the file by its digest, or else by the archive's checksums. Raises Damaged."""
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
    """Verify the zip file's own checksums, which torch ignores. Raises Damaged."""
    try:
        with zipfile.ZipFile(path) as f:
            bad = f.testzip()
    except Exception as e:
        raise Damaged(first_line(e)) from None
    if bad is not None:
        raise Damaged(f"{bad} in it does not match its checksum")


def set_aside(paths: list[Path]) -> None:
    """Rename damaged checkpoints, so that they are neither overwritten nor kept as the previous checkpoint."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + DAMAGED))


def remove_partial_files(out_dir: Path) -> None:
    """Delete temporary checkpoints of a killed process. No other process may be writing to out_dir."""
    for partial in out_dir.glob(f"*.pt.*{PARTIAL}"):
        partial.unlink(missing_ok=True)
