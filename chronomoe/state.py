"""Modules whose buffers are state: in the checkpoint, and never below float32."""

from __future__ import annotations

import math
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
            new = fn(old.detach()).requires_grad_(old.requires_grad)
            narrowed = old.is_floating_point() and new.dtype.itemsize < 4
            self._buffers[name] = old.to(new.device) if narrowed else new
        return self


def update_ema(ema: Tensor, value: Tensor, active: Tensor, alpha: float) -> None:
    """Move an EMA towards a value by 1 - alpha, in place, where `active` is True. The value must be finite."""
    value = value.to(ema.dtype)
    ema.lerp_(value, active.to(ema.dtype) * (1 - alpha))  # a weight of 0 leaves the EMA unchanged


def debiased(ema: Tensor, count: Tensor, alpha: float) -> Tensor:
    """An EMA corrected for its start at zero, from its number of updates: ema / (1 - alpha^count)."""
    if alpha == 0:
        return ema
    # 1 - alpha^n in float32 cancels for alpha = 0.999 and small n
    return ema / -torch.expm1(count.clamp_min(1).to(ema.dtype) * math.log(alpha))


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
