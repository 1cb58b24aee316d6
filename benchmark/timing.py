"""Competitors timed in turn within one process, and what so many turns allow to say.

A machine's speed drifts by more than what is measured here, but it drifts for all competitors alike: each turn runs all
of them, in alternating order, and ratios are taken within a turn. What does not drift is where a process finds its
memory, and that can make its products of matrices a third slower for good: so layers are compared in several.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from trainer.errors import UserError

Times = dict[str, list[float]]  # ms of each turn, by competitor
TO_TELL = 0.05  # a ratio whose 95% interval reaches further than this to either side is called noisy


@dataclass(frozen=True)
class Effort:
    """How long a comparison is pursued: at least `least` turns, then until `seconds` are over or `most` are done."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Row:
    """One competitor. Times are in ms, ratios to the table's first row and taken within a turn."""

    name: str
    median_ms: float
    ratio: float
    low: float  # middle half of the turns' ratios
    high: float
    interval: tuple[float, float] | None  # 95%, of the median ratio; None if the turns are too few for one
    turns: int
    by_process: tuple[float, ...]  # the ratio in each process that took part

    @property
    def noisy(self) -> bool:
        """Whether the ratio is not known to 5%: by its interval, or because another process has another one."""
        if any(abs(ratio - self.ratio) > TO_TELL * self.ratio for ratio in self.by_process):
            return True
        if self.interval is None:
            return True
        return max(self.ratio - self.interval[0], self.interval[1] - self.ratio) > TO_TELL * self.ratio


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def autocast(device: torch.device):
    """bfloat16 on CUDA, where the experts then run through grouped_mm; nothing on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def in_turns(competitors: dict[str, Callable[[], object]], device: torch.device, effort: Effort) -> Times:
    """Time the competitors in turn, after two turns to warm up."""
    names = list(competitors)
    times: Times = {name: [] for name in names}
    began = time.perf_counter()
    turn = -2
    while turn < effort.least or (turn < effort.most and time.perf_counter() - began < effort.seconds):
        if turn == 0:
            began = time.perf_counter()
        for name in names if turn % 2 == 0 else reversed(names):
            start = clock(device)
            competitors[name]()
            if turn >= 0:
                times[name].append((clock(device) - start) * 1000)
        turn += 1
    return times


def rows(processes: list[Times], names: Sequence[str] | None = None) -> list[Row]:
    """Compare all competitors, or those named, with the first; their turns in all processes together."""
    names = names or list(processes[0])
    found = []
    for name in names:
        by_process = [sorted(a / b for a, b in zip(times[name], times[names[0]])) for times in processes]
        ratios = sorted(ratio for of_process in by_process for ratio in of_process)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found.append(
            Row(
                name,
                statistics.median(ms for times in processes for ms in times[name]),
                middle,
                low,
                high,
                median_interval(ratios),
                len(ratios),
                tuple(map(statistics.median, by_process)),
            )
        )
    return found


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """95% confidence interval of the median, by order statistics; None where the values are fewer than 6."""
    n = len(values)
    chance, rank = 0.0, 0
    while (chance := chance + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return (sorted(values)[rank - 1], sorted(values)[n - rank]) if rank else None


@contextmanager
def stopwatch(device: torch.device, places: list[tuple[object, str]]) -> Iterator[dict[str, float]]:
    """Seconds spent in functions, by (owner, attribute), while the context is open; waits for a GPU each time."""
    spent = {name: 0.0 for _, name in places}
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]

    def timed(name: str, work: Callable):
        def call(*args, **kwargs):
            start = clock(device)
            try:
                return work(*args, **kwargs)
            finally:
                spent[name] += clock(device) - start

        return call

    for owner, name, work in originals:
        setattr(owner, name, timed(name, work))
    try:
        yield spent
    finally:
        for owner, name, work in originals:
            setattr(owner, name, work)


def told(row: Row) -> str:
    """Its ratio for a person."""
    note = "" if not row.noisy else "   too few turns" if row.interval is None else "   too noisy to tell 5%"
    if len(row.by_process) > 1:
        note = f"   by process {', '.join(f'{ratio:.2f}' for ratio in row.by_process)}{note}"
    return f"{row.ratio:6.3f} ({row.low:.3f} to {row.high:.3f}){note}"


def as_facts(row: Row) -> dict:
    return vars(row) | {"noisy": row.noisy}


class Report:
    """Tables for a person, as they are ready, and all of them for a program."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.tables: list[dict] = []

    def say(self, line: str) -> None:
        try:
            print(line, file=sys.stderr if self.quiet else sys.stdout, flush=True)
        except BrokenPipeError:
            raise UserError("nobody reads the tables any more; give them a file, or --json and a file") from None

    def compare(
        self, part: str, title: str, times: Times | list[Times], pairs: Sequence[tuple[str, str]] = (), **facts
    ) -> None:
        """A table of competitors, each against the first; and of `pairs` of them, where both took part.

        times: of one process, or of several.
        """
        processes = times if isinstance(times, list) else [times]
        found = rows(processes)
        names = [row.name for row in found]
        others = {f"{a} / {b}": rows(processes, (b, a))[1] for a, b in pairs if a in names and b in names}
        width = max(28, *map(len, (*names, *others)))
        self.say(f"\n{title}\n  {'':{width}} {'median':>12}   ratio (middle half)")
        for row in found:
            self.say(f"  {row.name:{width}} {row.median_ms:9.2f} ms   {told(row) if row is not found[0] else '    1'}")
        for name, row in others.items():
            self.say(f"  {name:{width}} {'':12}   {told(row)}")
        self.say(f"  {found[0].turns} turns" + (f" in {len(processes)} processes" if len(processes) > 1 else ""))
        table = {
            "rows": [as_facts(row) for row in found],
            "pairs": {name: as_facts(row) for name, row in others.items()},
        }
        self.tables.append({"part": part, "title": title} | table | facts)

    def tell(self, part: str, title: str, lines: list[tuple[str, float, str]], **facts) -> None:
        """Single numbers: (name, value, unit)."""
        width = max(28, *(len(name) for name, _, _ in lines))
        self.say(f"\n{title}")
        for name, value, unit in lines:
            number = f"{value:14,}" if isinstance(value, int) else f"{value:14,.4g}"
            self.say(f"  {name:{width}} {number} {unit}")
        numbers = [{"name": name, "value": value, "unit": unit} for name, value, unit in lines]
        self.tables.append({"part": part, "title": title, "numbers": numbers} | facts)
