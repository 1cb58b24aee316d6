"""Stop after the current step on Ctrl-C, SIGTERM and SIGHUP. A second signal stops at once.

The end of torchrun, and with CHRONO_STOP_WITH_PARENT=PID in the environment that of this process, counts as a SIGTERM
(POSIX only).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from trainer.distributed import World, torchrun_id
from trainer.errors import UserError

PARENT = "CHRONO_STOP_WITH_PARENT"
POLL_SECONDS = 0.5  # between checks of the parent
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STDERR = 2


class Interrupt:
    """Signal handlers while the `with` block is open, and the first signal that any rank received."""

    def __init__(self, world: World | None = None):
        self.world = world or World()
        self.received = 0  # number of the first signal of this process
        self.agreed = 0  # number of a signal of any rank, as of the last poll
        self._first = 0.0
        # with several ranks one Ctrl-C arrives twice, from the terminal and from torchrun
        self._grace = 3.0 if self.world.world_size > 1 else 0.0

    def __enter__(self) -> Interrupt:
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def stopping(self) -> bool:
        """Whether all ranks have agreed to stop, by `poll`."""
        return self.agreed != 0

    @property
    def exit_status(self) -> int:
        """128 + the number of the signal, 0 without a signal."""
        number = self.received or self.agreed
        return 128 + number if number else 0

    def poll(self, flag: bool = False) -> bool:
        """Agree over ranks on whether to stop. Returns whether `flag` is set on any rank. Every rank calls this."""
        number, any_flag = self.world.all_reduce_max(self.received, int(flag))
        self.agreed = self.agreed or number
        return bool(any_flag)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._first < self._grace:
            return
        if self.received:
            # Not an exception, which a library could catch. Unfinished files are not in place yet, so the last
            # checkpoint is intact.
            _write_stderr(b"\nstopped at once; the last checkpoint is unchanged\n")
            os._exit(128 + number)
        self.received = int(number)
        self._first = time.monotonic()
        _write_stderr(b"\nstopping after this step; a second signal stops at once\n")


class ParentWatch:
    """Sends this process a SIGTERM when a program that started it has ended, while the `with` block is open.

    Before the handlers of Interrupt, the signal ends the process: it waits for other ranks, or has nothing to save.

    Attributes:
        interrupt: its first signal prevents a SIGTERM, which would be a second signal.

    Raises UserError if CHRONO_STOP_WITH_PARENT is not a process id.
    """

    def __init__(self) -> None:
        self.interrupt: Interrupt | None = None
        named, parent = os.environ.get(PARENT), os.getppid()
        if named and not named.isdecimal():
            raise UserError(f"{PARENT}={named!r} must be the process id of the program that started this one")
        self._watched = ({int(named)} if named else set()) | ({parent} if torchrun_id() is not None else set())
        self._parent = parent
        self._closed = threading.Event()

    def __enter__(self) -> ParentWatch:
        if self._watched and os.name == "posix":
            threading.Thread(target=self._watch, name="parent", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if any(map(self._has_ended, self._watched)):
                if self.interrupt is None or not self.interrupt.received:
                    _write_stderr(b"\nthe program that started this run has ended\n")
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _has_ended(self, process: int) -> bool:
        # the id of a parent that has ended can belong to another process; with a shell in between it is no parent
        return os.getppid() != process if process == self._parent else not _exists(process)


def _write_stderr(line: bytes) -> None:
    """Write without print(), which the signal may have interrupted. Ignores a closed terminal."""
    with contextlib.suppress(OSError):
        os.write(STDERR, line)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
