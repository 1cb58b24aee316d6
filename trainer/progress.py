"""How far a run has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Line = dict[str, float | None]


class Progress:
    """Steps done, the best validation loss, and the log line whose evaluation is not done yet."""

    def __init__(self) -> None:
        self.step = 0  # optimizer steps done
        self.best_val_loss = math.inf  # from step 1 on
        self.pending: Line | None = {"step": 0}  # to be completed by an evaluation
        self.last_evaluation: tuple[int, float] | None = None  # (step, loss), of this start of the program

    def evaluated(self, losses: Mapping[str, float]) -> tuple[Line, bool]:
        """Complete the pending line with its validation losses. Returns it, and whether 'val/loss' is the best so far.

        Step 0 is never the best, because it is not saved.
        """
        line, val_loss = {**(self.pending or {}), **losses}, losses["val/loss"]
        self.pending = None
        self.last_evaluation = self.step, val_loss
        is_best = self.step > 0 and val_loss < self.best_val_loss  # False for NaN
        if is_best:
            self.best_val_loss = val_loss
        return line, is_best

    def state_dict(self) -> dict[str, Any]:
        """By the keys of a checkpoint."""
        return {"iter_num": self.step, "best_val_loss": self.best_val_loss, "unfinished": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["iter_num"])
        self.pending = state.get("unfinished")
        best = state.get("best_val_loss")
        self.best_val_loss = math.inf if best is None else float(best)  # nanoMoE saves a tensor
