"""Ctrl-C, SIGTERM and a terminal that closes let the step end; a second signal stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STDERR = 2


def _say(line: bytes) -> None:
    """Not by print(), which may be what the signal interrupts; and to nobody if the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(STDERR, line)


@contextlib.contextmanager
def caught_signals(ranks: int = 1) -> Iterator[list[int]]:
    """Within the block, a list that holds the number of the first signal once it has come."""
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
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
