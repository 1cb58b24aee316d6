"""Atomic writes, and append-only files of JSON lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".tmp"  # suffix of a file that is being written
INCOMPLETE = "incomplete"  # key in the meta.json of a dataset whose files are being replaced
MOST_AT_ONCE = 1 << 24  # bytes that one call reads
MAX_TEXT = 64 << 20  # bytes; larger settings or metadata are rejected


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It replaces `path` when the block ends without an exception."""
    with atomic_writes([path]) as (f,):
        yield f


@contextlib.contextmanager
def atomic_writes(paths: list[Path], before: Callable[[], None] = lambda: None) -> Iterator[list[BinaryIO]]:
    """Open files for writing. They replace `paths`, in order, when the block ends without an exception.

    before: called when all files are on the disk, before the first one replaces its path.
    """
    partials = [path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}") for path in paths]
    try:
        with contextlib.ExitStack() as opened:
            files: list[BinaryIO] = [opened.enter_context(partial.open("wb")) for partial in partials]
            yield files
            for f in files:
                f.flush()
                os.fsync(f.fileno())
        before()
        for partial, path in zip(partials, paths):
            os.replace(partial, path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def remove_partial_files(path: Path) -> None:
    """Delete temporary files of a killed process beside `path`. No other process may be writing it."""
    for partial in partial_files(path):
        partial.unlink(missing_ok=True)


def partial_files(path: Path) -> list[Path]:
    """Temporary files beside `path`, of this or another process, which may have been killed."""
    return [*path.parent.glob(f"{path.name}.*{PARTIAL}")]


def link_or_copy(path: Path, name: Path) -> None:
    """Replace `name` by a hard link to the file at `path`, or by a copy where links are not supported."""
    partial = name.with_name(f"{name.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            os.link(path, partial)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, partial)
            with partial.open("rb+") as f:
                os.fsync(f.fileno())
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)


class ReadFile(io.FileIO):
    """A file whose errors of reading are kept: zipfile and torch turn them into others."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            content = os.read(self.fileno(), min(len(view), MOST_AT_ONCE))
        except OSError as e:
            self.error = e
            raise
        view[: len(content)] = content
        return len(content)

    def read(self, size: int | None = -1) -> Any:
        return io.RawIOBase.read(self, -1 if size is None else size)

    def readall(self) -> Any:
        return io.RawIOBase.readall(self)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also if it is not a regular file: opening a FIFO would wait forever.

    An OSError of reading is kept in `raw.error` of the result.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "a path cannot hold a null character", str(path)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return io.BufferedReader(ReadFile(handle))


def is_there(path: Path) -> bool:
    """Whether there is something at the path, also a link to nothing. Raises OSError if that is unknown."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            return False
        raise
    return True


def read_text(path: Path, may_be_pipe: bool = False) -> str:
    """Read the UTF-8 text of a small file. Raises OSError, or ValueError if it is too long or not UTF-8.

    may_be_pipe: the user names the file, and can name a pipe, as the shell's <(...).
    """
    with path.open("rb") if may_be_pipe else open_regular(path) as f:
        content = f.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"it is longer than {MAX_TEXT >> 20} MiB")
    return content.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """json.loads that raises only ValueError for bad input."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonLines:
    """An append-only file with one JSON object per line.

    When `write` returns, the operating system has the line, so killing the process does not lose it; `sync` waits for
    the disk. If the disk is full, lines wait in memory and are written in order once there is space.

    Args:
        keep: number of lines that the file had when the run was saved; later lines are removed. None: unknown, and the
            readable lines of steps up to `upto` are kept.
        upto: last step of a line that is kept.
        sha256: hex digest of the first `keep` lines; None: unknown.
        one_per_step: whether each step has at most one line.

    If the first `keep` lines are not those that were saved, `damage` describes it, and the readable lines are kept.
    """

    def __init__(self, path: Path, keep: int | None, upto: int, sha256: str | None = None, one_per_step: bool = True):
        self.path = path
        self.count, self.damage, self.hashed = _cut(path, keep, upto, sha256, one_per_step)
        self.file = path.open("ab", buffering=0)
        self.size = self.file.seek(0, os.SEEK_END)
        self.waiting: list[bytes] = []
        self.lock = threading.Lock()  # the checkpoint's thread flushes too

    @property
    def sha256(self) -> str:
        """Hex digest of all lines so far, including those that wait."""
        return self.hashed.hexdigest()

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Raises OSError if it has to wait in memory."""
        # JSON has no NaN or infinity
        plain = {k: None if isinstance(v, float) and not -1e308 < v < 1e308 else v for k, v in values.items()}
        line = json.dumps(plain).encode() + b"\n"
        self.waiting.append(line)
        self.count += 1
        self.hashed.update(line)
        self.flush()

    def flush(self) -> None:
        """Write the waiting lines. Raises OSError."""
        with self.lock:
            while self.waiting:
                line = self.waiting[0]
                try:
                    written = 0
                    while written < len(line):
                        written += self.file.write(line[written:])
                except OSError:
                    with contextlib.suppress(OSError):
                        self.file.truncate(self.size)  # remove a partial line
                    raise
                self.size += len(line)
                del self.waiting[0]

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _cut(
    path: Path, keep: int | None, upto: int, sha256: str | None, one_per_step: bool
) -> tuple[int, str | None, Any]:
    """Truncate the file as described in JsonLines. Returns (number of lines, damage, hash object of the lines)."""
    path.touch()
    if keep is not None:
        count, size, hashed = _hash_lines(path, keep)
        if sha256 is not None:
            whole = hashed.hexdigest() == sha256
        else:
            with open_regular(path) as f:
                first = itertools.islice(f, keep)
                whole = sum(1 for _ in _lines_in_order(first, upto, one_per_step)) == keep
        if count == keep and whole:
            if size < path.stat().st_size:
                os.truncate(path, size)
            return count, None, hashed
    count, hashed = 0, hashlib.sha256()
    with atomic_write(path) as new, open_regular(path) as old:
        for line in itertools.islice(_lines_in_order(old, upto, one_per_step), keep):
            new.write(line)
            count += 1
            hashed.update(line)
    if keep is None:
        return count, None, hashed
    if count < keep:
        damage = f"{path.name}: {keep - count} of {keep} lines up to step {upto} are missing or damaged"
    else:
        damage = f"{path.name}: lines up to step {upto} were changed or repeated, {keep} are kept"
    return count, damage, hashed


def _hash_lines(path: Path, most: int) -> tuple[int, int, Any]:
    """(number, size in bytes, hash object) of the first `most` lines of a file."""
    count = size = 0
    hashed = hashlib.sha256()
    with open_regular(path) as f:
        for line in itertools.islice(f, most):
            count, size = count + 1, size + len(line)
            hashed.update(line)
    return count, size, hashed


def _lines_in_order(lines: Iterable[bytes], upto: int, one_per_step: bool) -> Iterator[bytes]:
    """The lines that are JSON objects with a `step` of at most `upto`, in non-decreasing order of steps."""
    last = -1
    of_last: set[bytes] = set()  # lines of the last step, to find repetitions
    for line in lines:
        try:
            step = parse_json(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):  # cut short by a kill, or damaged
            continue
        if isinstance(step, bool) or not isinstance(step, int) or not last <= step <= upto:
            continue
        if step > last:
            last, of_last = step, set()
        elif one_per_step or line in of_last:
            continue
        of_last.add(line)
        yield line


def _sync_folder(folder: Path) -> None:
    """Write renames in the folder to the disk, where the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
