"""What a run prints: a table with one row per logged step, other lines, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from chronomoe.metrics import summary
from trainer.progress import Line
from trainer.settings import Settings

tqdm.set_lock(threading.RLock())  # tqdm's default is a system semaphore, which a killed process leaves behind

GAP = "  "
ROWS_PER_HEADER = 50


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    title: str
    width: int
    cell: Callable[[Line], str]  # empty if the line does not have the metric
    meaning: str = ""  # for the legend
    is_shown: bool = True


class Console:
    """Prints to stdout. Errors of a closed terminal or a full disk are ignored.

    Args:
        settings: of the run.
        first_step: step where this start of the run begins.
    """

    def __init__(self, settings: Settings, first_step: int = 0):
        self.max_iters = settings.max_iters
        self.first_step = first_step
        self.began = time.perf_counter()
        self.width = shutil.get_terminal_size().columns
        self.columns = fitting([c for c in self._columns(settings) if c.is_shown], self.width)
        self.rows = 0
        self.bar: tqdm | None = None
        if sys.stdout.isatty():
            self.bar = tqdm(total=self.max_iters, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def info(self, line: str) -> None:
        """Print a line, on a terminal wrapped between words."""
        with contextlib.suppress(OSError):
            if self.bar is not None:
                tqdm.write(wrapped(line, self.width), file=sys.stdout)
            else:
                sys.stdout.write(f"{line}\n")  # one write: other threads print too
                sys.stdout.flush()

    def advance(self) -> None:
        """Count a finished step in the progress bar."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.update()

    def row(self, line: Line) -> None:
        """Print a logged step, after the table's header if it is due."""
        if self.rows == 0:
            legend = "; ".join(f"{c.title} = {c.meaning}" for c in self.columns if c.meaning)
            self.info(wrapped(f"columns: {legend}", self.width))
        if self.rows % ROWS_PER_HEADER == 0:
            self.info(GAP.join(f"{c.title:>{c.width}}" for c in self.columns))
        self.rows += 1
        values: Line = {**line, **summary(line)}
        self.info(GAP.join(f"{c.cell(values):>{c.width}}" for c in self.columns).rstrip())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _columns(self, s: Settings) -> list[Column]:
        """All columns of these settings, the most important ones first."""
        chrono, step_width = s.chrono, max(4, len(str(s.max_iters)))
        biased, has_bridge = chrono.beta, chrono.beta and chrono.bridge
        return [
            Column("step", step_width, number("step", "d")),
            Column("loss", 7, number("train/loss", ".4f"), "training loss, nats per token"),
            Column("val", 7, number("val/loss", ".4f"), "validation loss"),
            Column("tok/s", 7, number("time/tokens_per_s", ",.0f"), "tokens per second"),
            Column("left", 7, self._time_left, "time left"),
            Column("spread", 6, number("beta/spread_max", ".4f"), "largest minus smallest beta of a layer", biased),
            Column("JS", 7, number("routing/js_max", ".1e"), "divergence of routing by beta, nats", biased),
            Column("flip", 5, number("routing/flip_max", ".3f"), "share of tokens with another first expert", biased),
            Column("r", 4, number("routing/relevance_min", ".2f"), "strength with which beta is applied", has_bridge),
            Column("phi", 6, number("coherence/phi_min", "+.3f"), "lowest slow coherence", chrono.coherence),
            Column("prunes", 6, number("lifecycle/candidates", ".0f"), "open prune proposals", chrono.lifecycle),
            Column("phi max", 7, number("coherence/phi_max", "+.3f"), "highest slow coherence", chrono.coherence),
            Column("load cv", 7, number("load/cv_max", ".3f"), "variation of the experts' loads", s.n_exp > 1),
            Column("grad", 6, number("grad_norm", ".3f"), "norm of the gradient"),
            Column("lr", 7, number("lr", ".1e"), "learning rate"),
        ]

    def _time_left(self, line: Line) -> str:
        step = line["step"] or 0
        if "time/tokens_per_s" not in line:
            return ""
        per_step = (time.perf_counter() - self.began) / max(step - self.first_step, 1)
        minutes, seconds = divmod(round(per_step * (self.max_iters - step)), 60)
        return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}:{seconds:02}"


def number(metric: str, form: str) -> Callable[[Line], str]:
    """A column's cell: a metric's value in the format `form`."""

    def text(line: Line) -> str:
        value = line.get(metric)
        return "" if value is None else format(value, form)

    return text


def fitting(columns: list[Column], width: int) -> list[Column]:
    """The first columns that fit into `width` characters."""
    found: list[Column] = []
    used = -len(GAP)
    for column in columns:
        used += len(GAP) + column.width
        if used > width:
            break
        found.append(column)
    return found


def wrapped(line: str, width: int) -> str:
    """The line in pieces of at most `width` characters, broken between words."""
    if len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
