"""Modules whose buffers are state: in the checkpoint, and never below float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class StateModule(nn.Module):
    """Module whose buffers follow `.to(device)` but keep at least float32.

    In bfloat16 an EMA with factor 0.999 stalls: its increments are below half a unit in the last place.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StateModule:
        for name, old in self._buffers.items():
            if old is None:
                continue
            new = fn(old)
            narrowed = old.is_floating_point() and new.dtype.itemsize < 4
            self._buffers[name] = old.to(new.device) if narrowed else new
        return self


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
