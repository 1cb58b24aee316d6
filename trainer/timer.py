"""Wall-clock time per training step, without evaluations and saving."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class StepTimer:
    """Mean time per step since the last restart, without the time in `paused` blocks. The caller counts `steps`.

    Reading the clock synchronizes with the device, so that the counted steps are finished.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start measuring from now."""
        self.began, self.steps = self._now(), 0

    def ms_per_step(self) -> float:
        """Milliseconds per step since the last restart."""
        return (self._now() - self.began) * 1000 / self.steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
        before = self._now()
        yield
        self.began += self._now() - before

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
