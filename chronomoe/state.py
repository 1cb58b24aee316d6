"""A module whose tensors are state, not weights: kept in float32 and in the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StateModule(nn.Module):
    """Buffers that follow `.to(device)` but are never narrowed below float32.

    `model.to(torch.bfloat16)` would otherwise cast them, and an EMA with factor 0.999 stalls in bfloat16:
    its increments are below half a unit in the last place.
    """

    def _apply(self, fn, recurse=True):
        for name, old in self._buffers.items():
            new = fn(old)
            narrowed = old.is_floating_point() and new.dtype.itemsize < 4
            self._buffers[name] = old.to(new.device) if narrowed else new
        return self


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it came so: the precision in which statistics are taken and read."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
