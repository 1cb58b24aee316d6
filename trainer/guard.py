"""Skip steps whose loss or gradient is not finite, without synchronizing with the device, and report them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chronomoe import MoETrace

LOSSES = ("the loss", "the auxiliary loss", "the router z-loss")


@dataclass(frozen=True)
class Skipped:
    """Steps that were skipped since the last report."""

    steps: int
    total: int  # since the run began
    in_a_row: int  # consecutive, up to the last step
    first_step: int
    first_bad: str  # first value of that step that was not finite, in the order of computation

    def line(self) -> str:
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"skipped {steps}: {self.first_bad} was not finite in step {self.first_step} ({self.total} in all)"


class NonFiniteGuard:
    """Decides on the device whether an optimizer step is skipped.

    A skipped step does not change the weights, the optimizer's averages or the loop's state. `check` counts on the
    device; `report` reads the counts, which synchronizes. `state_dict` preserves them over a resume.
    """

    def __init__(self, model: nn.Module):
        named = list(model.named_parameters())
        self.parameters = [p for _, p in named]
        # in the order of backward: from the loss to the input
        self.names = [*LOSSES, *(f"the gradient of {name}" for name, _ in reversed(named))]
        device = self.parameters[0].device
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros_like(self.total)
        self.first_step = torch.full_like(self.total, -1)  # since the last report
        self.first_bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        self.reported = 0

    def norms(self) -> Tensor:
        """The 2-norm of each parameter's gradient, [P]; 0 without a gradient."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = iter(torch._foreach_norm(grads))
        zero = self.total.new_zeros((), dtype=torch.float32)
        return torch.stack([zero if p.grad is None else next(norms).float() for p in self.parameters])

    @torch.no_grad()
    def check(self, trace: MoETrace, norms: Tensor, step: int) -> Tensor:
        """1.0 if this step must be skipped, else 0.0: [] float32, as fused optimizers expect in found_inf."""
        losses = torch.stack([trace.cross_entropy, trace.aux_loss, trace.router_z_loss])
        bad = ~torch.cat([losses.to(norms.dtype), norms.flip(0)]).isfinite()
        skip = bad[0] | bad[len(LOSSES) :].any()
        is_first = skip & (self.first_step < 0)
        self.first_step.masked_fill_(is_first, step)
        self.first_bad |= bad & is_first
        self.total += skip
        self.in_a_row.add_(1).mul_(skip)
        return skip.float()

    def report(self) -> Skipped | None:
        """The steps skipped since the last report; None if there are none. Synchronizes with the device."""
        total, in_a_row, first_step = torch.stack([self.total, self.in_a_row, self.first_step]).tolist()
        if total == self.reported:
            return None
        name = self.names[int(self.first_bad.nonzero()[0].item())]
        found = Skipped(total - self.reported, total, in_a_row, first_step, name)
        self.reported = total
        self.first_step.fill_(-1)
        self.first_bad.zero_()
        return found

    def state_dict(self) -> dict[str, Tensor | int]:
        return {
            "total": self.total,
            "in_a_row": self.in_a_row,
            "first_step": self.first_step,
            "first_bad": self.first_bad,
            "reported": self.reported,
        }

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        for name in ("total", "in_a_row", "first_step", "first_bad"):
            getattr(self, name).copy_(state[name])
        self.reported = int(state["reported"])
