"""Checkpoint files. Writing is atomic, and loading never executes code.

In out_dir: ckpt.pt, the newest; ckpt_previous.pt, the one before it; ckpt_best.pt, the one with the lowest validation
loss. Each is torch's zip file with the SHA-256 of its content in the archive's comment, so every copy can be verified.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from trainer import structure
from trainer.errors import UserError, first_line
from trainer.files import PARTIAL, ReadFile, atomic_write, is_there, link_or_copy, open_regular

NAME, PREVIOUS, BEST = "ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt"
DAMAGED = ".damaged"  # suffix of a damaged checkpoint that was set aside
DIGEST = b"sha256:"
ZIP = b"PK"  # first bytes of a zip file
COMMENT_LENGTH = 2  # bytes at the end of a zip file that hold the length of its comment

TRANSIENT = (errno.EIO, errno.ESTALE)  # errors of reading that may not come again
RETRY_AFTER = (0.2, 2.0)  # seconds


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
    """Whether out_dir has a checkpoint, damaged or not. Raises UserError if out_dir cannot be read."""
    try:
        return any(is_there(out_dir / name) for name in (NAME, PREVIOUS, BEST))
    except OSError as e:
        raise UserError(f"cannot read {out_dir}: {e.strerror}") from None


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
        return checkpoint, notes + notes_on(path), damaged
    if notes:
        raise UserError("; ".join(notes) + "; there is no other checkpoint: start again with another --out_dir")
    raise UserError(f"there is no checkpoint in {out_dir}")


def load(path: Path) -> dict[str, Any]:
    """Load the checkpoint in a file, tensors on the CPU.

    Raises FileNotFoundError, Damaged, or UserError if the file cannot be read, is not a checkpoint or names code.
    """
    for seconds in (*RETRY_AFTER, None):
        try:
            with _reading(path) as f:
                _check_content(f)
                f.seek(0)
                checkpoint = _unpickled(f, path)
            break
        except FileNotFoundError:
            raise
        except OSError as e:
            if e.errno not in TRANSIENT or seconds is None:
                raise UserError(f"cannot read {path}: {e.strerror}; it is not changed") from None
            time.sleep(seconds)
        except MemoryError:
            raise UserError(f"cannot load {path}: there is not enough memory; it is not changed") from None
    try:
        structure.check_extent(checkpoint)
        structure.check(checkpoint, structure.CHECKPOINT)
    except structure.WrongStructure as e:
        raise UserError(f"{path} is not a training checkpoint: {e}") from None
    return checkpoint


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file. Raises the OSError of a read, whatever the block has made of it."""
    with open_regular(path) as f:
        raw = cast(ReadFile, cast(io.BufferedReader, f).raw)
        try:
            yield f
        except Exception as e:
            raise raw.error or e from None
        if raw.error:  # zipfile takes it for the end of the file
            raise raw.error


def _unpickled(f: BinaryIO, path: Path) -> Any:
    """torch.load of a file whose content is verified as far as it can be. Raises Damaged, UserError or MemoryError."""
    try:
        return _torch_load(f)
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e) or "global" in str(e):
            raise UserError(
                f"{path} is refused: it names code, and a checkpoint holds only tensors and numbers"
            ) from None
        raise Damaged("it is incomplete or not a checkpoint") from None
    except Exception as e:  # damaged bytes raise many kinds of exceptions
        if isinstance(e, MemoryError) or "alloc" in str(e):
            raise MemoryError from None
        raise Damaged("it is incomplete or not a checkpoint") from None


def _torch_load(f: BinaryIO | Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code, for kinds of tensors that no checkpoint has
        return torch.load(f, map_location="cpu", weights_only=True, **options)


def without_tensors(path: Path) -> dict[str, Any]:
    """Load a checkpoint for its numbers and names. Tensors are mapped, not read, and the digest is not verified.

    Raises OSError or Damaged.
    """
    with _reading(path) as f:
        _check_archive(f)
    try:
        saved = _torch_load(path, mmap=True)
        structure.check_extent(saved)
        structure.check(saved, structure.CHECKPOINT)
    except OSError:
        raise
    except structure.WrongStructure as e:
        raise Damaged(str(e)) from None
    except Exception:  # damaged bytes raise many kinds of exceptions
        raise Damaged("it is incomplete or not a checkpoint") from None
    return saved


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Whether this program wrote the checkpoint, and not nanoMoE."""
    return "random" in checkpoint


def notes_on(path: Path) -> list[str]:
    """A note if damage to the checkpoint in this file cannot be detected."""
    try:
        with open_regular(path) as f:
            is_legacy = f.read(len(ZIP)) != ZIP
    except OSError:
        return []
    return [f"{path} is in torch's format before 1.6, which has no checksums: damage cannot be detected"] * is_legacy


def _check_content(f: BinaryIO) -> None:
    """Verify the file by its digest, or else by the archive's checksums. Raises Damaged."""
    _check_archive(f)
    trailer = len(DIGEST) + 2 * hashlib.sha256().digest_size
    size = f.seek(0, os.SEEK_END)
    f.seek(max(0, size - 2 * trailer))
    tail = f.read()
    end = tail[-trailer:]
    if not end.startswith(DIGEST):
        if DIGEST in tail:
            raise Damaged("its end is missing")
        with _archive(f) as archive:
            bad = archive.testzip() if archive else None  # torch ignores these checksums
        if bad is not None:
            raise Damaged(f"{bad} in it does not match its checksum")
        return
    f.seek(0)
    sha256, left = hashlib.sha256(), size - trailer - COMMENT_LENGTH
    while left > 0:
        content = f.read(min(left, 1 << 20))
        if not content:
            break
        sha256.update(content)
        left -= len(content)
    sha256.update(bytes(COMMENT_LENGTH))
    if end != DIGEST + sha256.hexdigest().encode():
        raise Damaged("its content does not match its digest")


def _check_archive(f: BinaryIO) -> None:
    """Raise Damaged if the file is a zip file whose members are larger than it. torch does not compress them."""
    size = f.seek(0, os.SEEK_END)
    with _archive(f) as archive:
        members = archive.infolist() if archive else []
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise Damaged("its members are compressed or overlap, which torch does not write")


@contextlib.contextmanager
def _archive(f: BinaryIO) -> Iterator[zipfile.ZipFile | None]:
    """The file as a zip file; None if it is none. Raises Damaged for what zipfile cannot read."""
    f.seek(0)
    try:
        if not zipfile.is_zipfile(f):
            yield None
            return
        with zipfile.ZipFile(f) as archive:
            yield archive
    except (Damaged, MemoryError):
        raise
    except Exception as e:
        raise Damaged(first_line(e)) from None


def set_aside(paths: list[Path]) -> None:
    """Rename damaged checkpoints, so that they are neither overwritten nor kept as the previous checkpoint."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + DAMAGED))


def remove_partial_files(out_dir: Path) -> None:
    """Delete temporary checkpoints of a killed process. No other process may be writing to out_dir."""
    for partial in partial_files(out_dir):
        partial.unlink(missing_ok=True)


def partial_files(out_dir: Path) -> list[Path]:
    """Checkpoints in out_dir that are being written, or were when their process was killed."""
    return [*out_dir.glob(f"*.pt.*{PARTIAL}")]
