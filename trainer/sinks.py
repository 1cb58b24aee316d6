"""What a run logs to besides its files: the interface of a sink, and a thread that makes a sink's calls."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from trainer.errors import first_line, skip_exit_handlers
from trainer.progress import Line

MAX_QUEUED = 1000  # calls


class Sink(Protocol):
    """Receives what a run logs. No method raises or prompts, and only `finish` waits. After a failure a sink prints one
    line and does nothing.
    """

    def log(self, values: Line) -> None:
        """Log a step's metrics by name. They include `step`; None stands for a value that does not exist."""

    def line(self, text: str) -> None:
        """Log a line that the console prints."""

    def alert(self, title: str, text: str, step: int) -> None:
        """Tell the user about an event. At most one call per title and logged step."""

    def finish(self, in_haste: bool = False) -> None:
        """Write what is queued, and close. in_haste: a signal ended the program."""


class Calls:
    """Makes calls in order in a thread, so that a slow or hanging sink does not hold up training.

    It accepts calls from `start` to `finish`. After the first call that fails, or if too many wait, it prints one line
    and makes no more.

    Args:
        name: of the sink, for messages.
        info: prints a line.
    """

    def __init__(self, name: str, info: Callable[[str], None]):
        self.name = name
        self.info = info
        self.is_open = False
        self.failed = False
        self._queue: queue.SimpleQueue[tuple[str, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        self.is_open = True
        self._thread.start()

    def put(self, doing: str, call: Callable[[], Any]) -> None:
        """Queue a call. doing: a verb for the message if it fails."""
        if not self.is_open:
            return
        self._queue.put((doing, call))
        if self._queue.qsize() > MAX_QUEUED:
            self.fail("keep up", TimeoutError(f"{MAX_QUEUED} calls are waiting"))

    def finish(self, call: Callable[[], Any], seconds: float, hint: str = "") -> None:
        """Make a last call, and wait this long for all calls. hint: what to do if they take longer."""
        if not self.is_open:
            return
        self.put("finish", call)
        self.is_open = False
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive() and not self.failed:
            self.fail("finish", TimeoutError(f"not done after {seconds:g} s{hint}"))

    def fail(self, doing: str, e: Exception) -> None:
        """Report a failure, unless one was reported before. No call is made after it."""
        if self.failed:
            return
        self.is_open, self.failed = False, True
        skip_exit_handlers()  # those of a library that failed can hang, or print a traceback
        self.info(f"{self.name}: could not {doing} ({type(e).__name__}: {first_line(e)}); continuing without it")

    def _work(self) -> None:
        while (work := self._queue.get()) is not None and not self.failed:
            doing, call = work
            try:
                call()
            except Exception as e:
                self.fail(doing, e)
