"""Ctrl-C and SIGTERM let the step end; a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Within the block, a list that holds the number of the first signal once it has come."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught:
            # not an exception: no library may catch it or tidy up first. Files that were being written are not yet
            # in their places, so the last checkpoint is whole.
            os.write(STDERR, b"\nstopped at once; the last checkpoint is as it was\n")
            os._exit(128 + number)
        caught.append(number)
        os.write(STDERR, b"\nstopping after this step; once more stops at once\n")  # print() may be what it interrupts

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
