"""Wall-clock time per training step, without evaluations and saving."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class StepTimer:
    """Time since the last restart over the number of `steps` since then, without the time in `paused` blocks.

    Reading the clock waits for the device, so that the steps counted are finished.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.began, self.steps = self._now(), 0

    def ms_per_step(self) -> float:
        return (self._now() - self.began) * 1000 / self.steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self._now()
        yield
        self.began += self._now() - before

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
