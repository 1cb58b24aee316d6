"""Ctrl-C, SIGTERM and a terminal that closes let the step end; a second signal stops at once.

If the environment has CHRONO_STOP_WITH_PARENT=PID, the end of that process counts as a SIGTERM (on POSIX systems).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from trainer.errors import UserError

PARENT = "CHRONO_STOP_WITH_PARENT"
POLL = 0.5  # seconds between looks at the parent
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STDERR = 2


def _say(line: bytes) -> None:
    """Not by print(), which may be what the signal interrupts; and to nobody if the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(STDERR, line)


@contextlib.contextmanager
def caught_signals(ranks: int = 1) -> Iterator[list[int]]:
    """Within the block, a list that holds the number of the first signal once it has come.

    Raises UserError if CHRONO_STOP_WITH_PARENT is no process id.
    """
    parent = os.environ.get(PARENT)
    if parent and not parent.isdecimal():
        raise UserError(f"{PARENT}={parent!r} must be the process id of the program that started this one")
    caught: list[int] = []
    first = 0.0
    # with several ranks one Ctrl-C comes twice, from the terminal and from torchrun
    grace = 3.0 if ranks > 1 else 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if caught and time.monotonic() - first < grace:
            return
        if caught:
            # not an exception: no library may catch it or tidy up first. Files that were being written are not yet
            # in their places, so the last checkpoint is whole.
            _say(b"\nstopped at once; the last checkpoint is as it was\n")
            os._exit(128 + number)
        caught.append(number)
        first = time.monotonic()
        _say(b"\nstopping after this step; once more stops at once\n")

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handle) for number in heard}
    ended = threading.Event()
    if parent and os.name == "posix":
        threading.Thread(target=_stop_with, args=(int(parent), caught, ended), name="parent", daemon=True).start()
    try:
        yield caught
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_with(parent: int, caught: list[int], ended: threading.Event) -> None:
    """Send this process a SIGTERM once the process `parent` is gone, unless a signal has come before."""
    is_parent = os.getppid() == parent  # else a shell or torchrun stands between
    while not ended.wait(POLL):
        if os.getppid() != parent if is_parent else not _exists(parent):
            if not caught:  # a second signal would end the process at once
                _say(b"\nthe program that started this run is gone")
                os.kill(os.getpid(), signal.SIGTERM)
            return


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
