"""Measure the worth of every expert during training, for signal 'worth'.

The worth of an expert is the rise of the loss, in nats per token, when it is masked (trainer/interventions.py). It is
measured on batches of the current training text that are drawn apart from the training batches. A run that is resumed
measures the same, because the batches depend on seed and step only.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from chronomoe import ChronoLoop, fusion
from model import GPT
from trainer.data import BatchLoader
from trainer.device import Autocast
from trainer.distributed import World
from trainer.interventions import Batch


class WorthMeter:
    """Measures the worth every `interval` steps, and passes it to the loop. Batches are shared by the ranks.

    Args:
        model: of the run, not compiled.
        loop: of the model.
        loader: of the run's batches.
        interval: steps between measurements.
        batches: number per measurement, over all ranks.
        autocast: context of forward.
        world: the ranks.
    """

    def __init__(
        self,
        model: GPT,
        loop: ChronoLoop,
        loader: BatchLoader,
        interval: int,
        batches: int,
        autocast: Autocast,
        world: World,
    ):
        self.model, self.loop, self.loader, self.world = model, loop, loader, world
        self.interval, self.batches, self.autocast = interval, batches, autocast
        self.count, self.seconds = 0, 0.0  # of the measurements of this start of the program

    def is_due(self, step: int) -> bool:
        """Whether the worth must be measured before the training step after `step` steps."""
        return step % self.interval == 0

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Measure the worth after `step` steps and set it. Synchronizes with the device. Raises UserError for data."""
        began = time.perf_counter()
        beta = self.loop.router_state.beta_coeff
        losses = torch.zeros(self.batches, *beta.shape, device=beta.device)  # each rank fills its own batches
        was_training = self.model.training
        self.model.eval()
        try:
            for i in range(self.world.rank, self.batches, self.world.world_size):
                losses[i] = self._rises(step, i)
        finally:
            self.model.train(was_training)
        self.loop.set_worth(self.world.all_reduce_sum(losses).mean(0))
        self.count += 1
        self.seconds += time.perf_counter() - began

    def _rises(self, step: int, index: int) -> torch.Tensor:
        """The rise of the loss of one batch with each expert masked, [L, E]."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast())
            stack.enter_context(fusion(None))  # the number of tokens differs in each call, and each would be compiled
            batch = Batch(self.model, *self.loader.held_out(step, index), criteria=False)
            num_experts = self.loop.router_state.beta_coeff.shape[1]
            return torch.tensor(
                [
                    [batch.loss_masked({block: (expert,)}) - batch.loss for expert in range(num_experts)]
                    for block in self.loop.layer_ids
                ]
            )
