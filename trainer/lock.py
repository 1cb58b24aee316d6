"""A lock on a folder, so that only one process writes to it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError
from trainer.files import is_there, read_text

LOCK = ".lock"
HOLDER = ".lock.holder"


@contextlib.contextmanager
def folder_lock(out_dir: Path, wait: float = 0, option: str = "--out_dir") -> Iterator[None]:
    """Lock out_dir against other processes, creating it if needed; also on other hosts if the file system supports it.

    The system releases the lock when the process ends in any way. Raises UserError if another process holds the lock
    for longer than `wait` seconds, or if the folder cannot be written. `option` is the command-line option for the
    folder, for the message.
    """
    made = not os.path.exists(out_dir)
    path, holder = out_dir / LOCK, out_dir / HOLDER
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if is_there(path) and (path.is_symlink() or not path.is_file()):
            raise OSError(errno.EINVAL, f"{path} is not a regular file")  # a link would be followed
        lock = FileLock(path)
        lock.acquire(timeout=wait)
    except Timeout:
        who = ""
        with contextlib.suppress(OSError, ValueError):
            who = f" ({read_text(holder) or 'it has just started'})"
        raise UserError(f"another process is writing to {out_dir}{who}: wait for it, or use another {option}") from None
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            print(f"{out_dir} is on a file system without locks: a second process cannot be kept out")
            yield
            return
        raise UserError(f"cannot write to {out_dir}: {e.strerror or e}") from None
    try:
        with contextlib.suppress(OSError):  # the lock does not need it
            holder.unlink(missing_ok=True)
            with holder.open("x") as f:  # follows no link
                f.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        if made:
            _remove_if_unused(out_dir)
        lock.release()


def _remove_if_unused(out_dir: Path) -> None:
    """Remove a new folder that nothing was written to, because the run was refused."""
    with contextlib.suppress(OSError):
        if [path.name for path in out_dir.iterdir()] == [LOCK]:
            (out_dir / LOCK).unlink()
            out_dir.rmdir()
