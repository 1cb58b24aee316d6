"""Files that are whole or not there, and files that only grow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".tmp"  # how the name of a file ends that is being written
INCOMPLETE = "incomplete"  # key of the meta.json of a dataset whose files are being replaced
LARGEST_TEXT = 64 << 20  # bytes; no settings or metadata are longer


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing, that replaces `path` when the block ends without an exception."""
    with whole_files([path]) as (f,):
        yield f


@contextlib.contextmanager
def whole_files(paths: list[Path], before: Callable[[], None] = lambda: None) -> Iterator[list[BinaryIO]]:
    """Files, open for writing, that replace `paths` one after the other when the block ends without an exception.

    before: called when all of them are on the disk, and none has replaced its path yet.
    """
    partials = [path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}") for path in paths]
    try:
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(partial.open("wb")) for partial in partials]
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


def remove_leftovers(path: Path) -> None:
    """What a process that was killed while writing path left beside it. No other may be writing it now."""
    for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def twin(path: Path, name: Path) -> None:
    """Let `name` be the file at `path` too, taking the place of what was there: a hard link, or a copy."""
    partial = name.with_name(f"{name.name}.{os.getpid()}{PARTIAL}")
    try:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
        os.replace(partial, name)
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """The UTF-8 text of a small file. Raises OSError, or ValueError if it is no text or too long to be one."""
    with path.open("rb") as f:
        content = f.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it is longer than {LARGEST_TEXT >> 20} MiB")
    return content.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """json.loads, but everything that bad input makes it raise is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonLines:
    """A file of one JSON object per line that is only ever added to.

    A line is on its way to the disk when `write` returns, so killing the process loses none; `sync` waits until the
    disk has it. Where the disk is full, lines wait in memory and are written in their order once there is room.

    Args:
        keep: number of lines that an existing file had when the run was saved; later lines are removed. None: unknown,
            and the readable lines of steps up to `upto` are kept.
        upto: the last step that a line may have.
        sha256: hex digest of the first `keep` lines; None: unknown.
        one_per_step: no two lines have the same step.

    If the first `keep` lines are not those that were saved, `damage` says so, and the readable lines in order are kept.
    """

    def __init__(self, path: Path, keep: int | None, upto: int, sha256: str | None = None, one_per_step: bool = True):
        self.path = path
        self.count, self.damage, self.hashed = _cut(path, keep, upto, sha256, one_per_step)
        self.file = path.open("ab", buffering=0)
        self.size = self.file.seek(0, os.SEEK_END)
        self.waiting: list[bytes] = []
        self.lock = threading.Lock()  # a checkpoint's thread flushes too

    @property
    def sha256(self) -> str:
        """Hex digest of all lines so far, those that wait included."""
        return self.hashed.hexdigest()

    def write(self, values: dict[str, Any]) -> None:
        """Add a line. Raises OSError if it has to wait."""
        # JSON has no NaN or infinity
        plain = {k: None if isinstance(v, float) and not -1e308 < v < 1e308 else v for k, v in values.items()}
        line = json.dumps(plain).encode() + b"\n"
        self.waiting.append(line)
        self.count += 1
        self.hashed.update(line)
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait. Raises OSError if it cannot."""
        with self.lock:
            while self.waiting:
                line = self.waiting[0]
                try:
                    written = 0
                    while written < len(line):
                        written += self.file.write(line[written:])
                except OSError:
                    with contextlib.suppress(OSError):
                        self.file.truncate(self.size)  # no half lines
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
    """Shorten the file as JsonLines says. Returns (lines left, damage, their hash object)."""
    path.touch()
    if keep is not None:
        count, size, hashed = _hash_lines(path, keep)
        if sha256 is not None:
            whole = hashed.hexdigest() == sha256
        else:
            with path.open("rb") as f:
                first = itertools.islice(f, keep)
                whole = sum(1 for _ in _lines_in_order(first, upto, one_per_step)) == keep
        if count == keep and whole:
            if size < path.stat().st_size:
                os.truncate(path, size)
            return count, None, hashed
    count, hashed = 0, hashlib.sha256()
    with whole_file(path) as new, path.open("rb") as old:
        for line in itertools.islice(_lines_in_order(old, upto, one_per_step), keep):
            new.write(line)
            count += 1
            hashed.update(line)
    if keep is None:
        return count, None, hashed
    if count < keep:
        damage = f"{path.name}: {keep - count} of {keep} lines up to step {upto} missing or damaged"
    else:
        damage = f"{path.name}: lines up to step {upto} changed or repeated, {keep} kept"
    return count, damage, hashed


def _hash_lines(path: Path, most: int) -> tuple[int, int, Any]:
    """(number, bytes, hash object) of the first `most` lines of a file."""
    count = size = 0
    hashed = hashlib.sha256()
    with path.open("rb") as f:
        for line in itertools.islice(f, most):
            count, size = count + 1, size + len(line)
            hashed.update(line)
    return count, size, hashed


def _lines_in_order(lines: Iterable[bytes], upto: int, one_per_step: bool) -> Iterator[bytes]:
    """The lines that are JSON objects whose `step` is at most `upto` and not before an earlier line's."""
    last, of_last = -1, set()  # the lines of the last step: one that comes again is a repetition
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
    """Let the disk have a renaming too, where the system can be asked for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
