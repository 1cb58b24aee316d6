"""Copies of a finished run that train on from its last checkpoint: pruned, damaged, or untouched."""

from __future__ import annotations

import torch

from auditing.measure import check_signal, folder_of
from comparison.runs import Run
from trainer import checkpoint, setup
from trainer.checkpointer import copy_to_cpu
from trainer.schedule import learning_rate
from trainer.step import StepResult


class Twin:
    """Trains on from the last checkpoint of a run, on the data that the run would see next. Nothing is written.

    The learning rate is that of the run's schedule: after its end, min_lr. Call `restart` to begin, and to begin again.

    Args:
        run: the finished run.
        trained: the same, opened by `measure.opened`.
    """

    def __init__(self, run: Run, trained: setup.Run):
        self.trained = trained
        self.saved = checkpoint.load(folder_of(run) / checkpoint.NAME)

    def restart(self) -> None:
        """Return to the checkpoint: weights, optimizer, loop and random state."""
        self.trained.checkpointer.restore(copy_to_cpu(self.saved))  # a copy: the optimizer keeps what it loads

    def step(self) -> StepResult:
        """Take a training step. Raises Stopped after a signal."""
        check_signal(self.trained)
        run, progress = self.trained, self.trained.progress
        run.model.train()
        lr = learning_rate(run.settings, progress.step)
        if run.worth is not None and run.worth.is_due(progress.step):
            run.worth.measure(progress.step)
        result = run.training_step(run.batches.training(progress.step), progress.step + 1, lr, logged=False)
        progress.step += 1
        return result

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the run's fixed validation batches, nats per token."""
        run = self.trained
        run.model.eval()
        losses = []
        for i in range(run.settings.eval_iters):
            check_signal(run)
            with run.training_step.autocast():
                losses.append(run.model(*run.batches.validation(i), return_logits=False)[1].item())
        return sum(losses) / len(losses)
