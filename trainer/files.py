"""Files that are whole or not there, and files that only grow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".tmp"  # how the name of a file ends that is being written
LARGEST_TEXT = 64 << 20  # bytes; no settings or metadata are longer


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing that takes path's place when the block ends, and only if it ends well."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
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
    """A file of one JSON object a line that is only ever added to.

    A line is on its way to the disk when `write` returns, so killing the process loses none; `sync` waits until the
    disk has it. Where the disk is full, lines wait in memory and are written in their order once there is room.

    keep: how many lines of an existing file stay; None keeps those whose `step` is at most `upto`. Damaged lines go.
    """

    def __init__(self, path: Path, keep: int | None, upto: int):
        self.path = path
        self.count = _cut(path, keep, upto)
        self.file = path.open("ab", buffering=0)
        self.size = self.file.seek(0, os.SEEK_END)
        self.waiting: list[bytes] = []
        self.lock = threading.Lock()  # a checkpoint's thread flushes too

    def write(self, values: dict[str, Any]) -> None:
        """Add a line. Raises OSError if it has to wait."""
        # JSON has no NaN or infinity
        plain = {k: None if isinstance(v, float) and not -1e308 < v < 1e308 else v for k, v in values.items()}
        self.waiting.append(json.dumps(plain).encode() + b"\n")
        self.count += 1
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


def _cut(path: Path, keep: int | None, upto: int) -> int:
    """Shorten the file as JsonLines says; the number of lines left."""
    kept, rest = 0, False
    copy = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with path.open("rb") as old, copy.open("wb") as new:
            for number, line in enumerate(old):
                if _stays(line, number, keep, upto):
                    new.write(line)
                    kept += 1
                else:
                    rest = True
            new.flush()
            os.fsync(new.fileno())
        if rest:
            os.replace(copy, path)
    except FileNotFoundError:
        return 0
    finally:
        copy.unlink(missing_ok=True)
    return kept


def _stays(line: bytes, number: int, keep: int | None, upto: int) -> bool:
    if keep is not None and number >= keep:
        return False
    try:
        return line.endswith(b"\n") and (parse_json(line)["step"] <= upto or keep is not None)
    except (ValueError, KeyError, TypeError):  # cut short by a kill, or damaged
        return False


def _sync_folder(folder: Path) -> None:
    """Let the disk have a renaming too, where the system can be asked for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
