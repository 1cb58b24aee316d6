"""One training step, which train.py, bench.py and the tests run.

Only benchmark/one_step.py repeats it, to time other checkouts.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chronomoe import ChronoLoop, MoETrace
from model import GPT
from trainer.device import Autocast
from trainer.distributed import World
from trainer.graphs import GraphedBackward
from trainer.guard import NonFiniteGuard


class StepResult(NamedTuple):
    """What a step leaves on the device."""

    trace: MoETrace  # summed over micro-batches and ranks
    grad_norm: Tensor  # [], before clipping
    found_inf: Tensor  # [], 1.0 if the step was skipped because loss or gradient was not finite


class TrainingStep:
    """Forward and backward over micro-batches, unscale, guard, clip, optimizer step, update of the loop.

    A step does not synchronize with the device, if experts run through grouped_mm. If loss or gradient is not finite,
    the optimizer skips the step and the loop its observation, both decided on the device.

    Args:
        model: on its device.
        optimizer: must honour `found_inf`, as torch's fused optimizers do.
        loop: of the model.
        guard: detects values that are not finite.
        scaler: of the gradients, enabled for float16.
        micro_batches: number per step on this rank.
        grad_clip: largest norm of the gradient; 0: do not clip.
        autocast: context of forward.
        forward: the model, compiled or wrapped in DDP; None: the model itself.
        world: the ranks.
        cuda_graphs: replay forward and backward as CUDA graphs; for one rank, and steps that do not synchronize.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        loop: ChronoLoop,
        guard: NonFiniteGuard,
        scaler: torch.amp.GradScaler,
        *,
        micro_batches: int = 1,
        grad_clip: float = 1.0,
        autocast: Autocast = nullcontext,
        forward: nn.Module | None = None,
        world: World | None = None,
        cuda_graphs: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.loop = loop
        self.guard = guard
        self.scaler = scaler
        self.micro_batches = micro_batches
        self.max_norm = grad_clip or torch.inf
        self.autocast = autocast
        self.forward = model if forward is None else forward
        self.world = world or World()
        self.backward = self._backward_of
        if cuda_graphs:
            probe = model.router_state.probe
            self.backward = GraphedBackward(
                self._backward_of, [*model.parameters(), *([] if probe is None else [probe])]
            )

    def __call__(
        self, batches: Iterable[tuple[Tensor, Tensor]], step: int, lr: float | None = None, logged: bool = True
    ) -> StepResult:
        """Take one step.

        Args:
            batches: (inputs, targets) of this rank's micro-batches, [B, T] each; as many as `micro_batches`.
            step: number of this step, from 1; the guard reports it.
            lr: learning rate; None: unchanged.
            logged: compute the trace's fields that are only logged.

        Raises ValueError for another number of batches.
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        trace = self._accumulate(batches, logged)
        loss_scale = None
        if self.model.router_state.probe is not None:  # the loss of a rank is not divided by the number of ranks
            loss_scale = self.scaler.scale(trace.tokens.new_full((), self.world.world_size))
        trace = self.loop.collect(trace, loss_scale)
        self.scaler.unscale_(self.optimizer)
        norms = self.guard.norms()
        grad_norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_norm, grad_norm)
        found_inf = self.guard.check(trace, norms, step)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()  # scaler.step() would overwrite found_inf with one that ignores the loss
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not isinstance(self.backward, GraphedBackward))
        self.loop.step(trace, found_inf)
        return StepResult(trace, grad_norm, found_inf)

    def _accumulate(self, batches: Iterable[tuple[Tensor, Tensor]], logged: bool) -> MoETrace:
        """Accumulate the gradient of the mean loss. Returns the trace of this rank."""
        total: MoETrace | None = None
        for i, (x, y) in enumerate(batches, 1):
            # DDP averages gradients in the backward of the last micro-batch only
            no_sync = self.world.world_size > 1 and i < self.micro_batches
            with self.forward.no_sync() if no_sync else nullcontext():  # type: ignore[operator]
                trace = self.backward(x, y, logged)
            total = trace if total is None else total + trace
        if total is None or i != self.micro_batches:
            raise ValueError(f"a step needs {self.micro_batches} micro-batches")
        return total

    def _backward_of(self, x: Tensor, y: Tensor, logged: bool) -> MoETrace:
        """Forward and backward of one micro-batch."""
        with self.autocast():
            _, loss, trace = self.forward(x, y, return_trace=True, logged=logged, return_logits=False)
        self.scaler.scale(loss / self.micro_batches).backward()
        return trace
