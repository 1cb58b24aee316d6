"""TensorBoard: means and extremes over layers, distributions over experts, events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from chronomoe.metrics import EXPERT_VALUES, by_expert, place_of, summary
from trainer.progress import Line
from trainer.sinks import Calls

FINISH_TIMEOUT = 10.0  # seconds to write what is left


class TensorBoardLog:
    """A Sink that writes TensorBoard's event files.

    Args:
        info: prints a line.
        folder: for the event files.
        first_step: first step that will be logged. TensorBoard ignores what the folder has of this step and later ones.
    """

    def __init__(self, info: Callable[[str], None], folder: Path, first_step: int):
        self.calls = Calls("TensorBoard", info)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=first_step)
        except ModuleNotFoundError:
            self.calls.fail("start", ModuleNotFoundError("pip install tensorboard"))
        except Exception as e:
            self.calls.fail("start", e)
        else:
            self.calls.start()
            info(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, values: Line) -> None:
        self.calls.put("log", lambda: self._log(values))

    def line(self, text: str) -> None: ...

    def alert(self, title: str, text: str, step: int) -> None:
        self.calls.put("log", lambda: self.writer.add_text(title, text, step))

    def finish(self, in_haste: bool = False) -> None:
        self.calls.finish(lambda: self.writer.close(), FINISH_TIMEOUT)

    def _log(self, values: Line) -> None:
        step = int(values["step"] or 0)
        scalars = {name: value for name, value in values.items() if place_of(name) is None and name != "step"}
        for name, value in (scalars | summary(values)).items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        if "val/loss" in values:
            for metric in EXPERT_VALUES:
                found = [v for v in by_expert(values, metric).values() if v is not None]
                if found:
                    self.writer.add_histogram(f"experts/{metric}", np.array(found), step)
        self.writer.flush()
