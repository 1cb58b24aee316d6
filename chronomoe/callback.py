"""The loop inside Hugging Face's Trainer, in two lines:

    from chronomoe.callback import ChronoCallback
    trainer.add_callback(ChronoCallback(trainer, config))

The loop is updated after each optimizer step, and its summary is logged by Trainer's own logging. Trainer's checkpoints
hold its state, which is a part of the model. This module needs transformers and accelerate; the package does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe.attach import attach
from chronomoe.config import ChronoConfig
from chronomoe.families import Family
from chronomoe.metrics import place_of, summary

try:
    import accelerate  # noqa: F401
    from transformers import TrainerCallback
except ImportError:
    raise ImportError(
        "chronomoe.callback needs transformers and accelerate: pip install transformers accelerate"
    ) from None

PREFIX = "chrono/"


class ChronoCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Attaches the loop to trainer.model and closes it after each optimizer step.

    Args:
        trainer: the Trainer, before `train` is called.
        config: settings of the loop. None: those stored with the model, and its state.
        families: descriptions of other routers, see `attach`.

    Attributes:
        handle: the Handle, for `report` and `detach`.

    Raises ValueError as `attach` does, or if Trainer would copy the model to several devices (DataParallel).
    """

    def __init__(self, trainer: Any, config: ChronoConfig | None = None, *, families: Sequence[Family] = ()):
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"Trainer copies the model to {trainer.args.n_gpu} devices: start one process per device with torchrun"
            )
        self.trainer = trainer
        self.handle = attach(trainer.model, config, families=families, seed=trainer.args.seed)
        self._loss_scale: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and self.handle.config.measures("first_order"):
            self._loss_scale = self._tensor(scaler.get_scale())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a step in float16 whose gradients are not finite
        found_inf = self._tensor(1.0) if self.trainer.accelerator.optimizer_step_was_skipped else None
        self.handle.step(found_inf, self._loss_scale)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:
            return
        values = self.handle.read()
        scalars = {name: value for name, value in values.items() if place_of(name) is None and value is not None}
        self.trainer.log({PREFIX + name: value for name, value in (summary(values) | scalars).items()})
        control.should_log = True  # `log` sets it to False, and Trainer has not logged the loss yet

    def _tensor(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.handle.loop.router_state.beta_coeff.device)
