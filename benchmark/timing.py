"""Time competitors in turns within one process, and compute ratios with their uncertainty.

The speed of a machine drifts by more than the differences that are measured here, but equally for all competitors. So
each turn runs all of them, in alternating order, and ratios are computed within a turn. The placement of memory does
not drift: it can make the matrix products of one process a third slower for its lifetime. So layers are timed in
several processes.
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

Times = dict[str, list[float]]  # ms of each turn, by competitor
CALLS_ON_CUDA = 4  # per turn: the host runs ahead of the GPU, as in training
MAX_ERROR = 0.05  # a ratio is noisy if its 95% interval extends further than this on either side


@dataclass(frozen=True)
class Effort:
    """Duration of a comparison: at least `least` turns, then until `seconds` have passed or `most` turns are done."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Row:
    """Results of one competitor. Times are in ms; ratios are relative to the first competitor, within a turn."""

    name: str
    median_ms: float
    ratio: float
    low: float  # quartiles of the ratio over turns
    high: float
    interval: tuple[float, float] | None  # 95%, of the median ratio; None with too few turns
    turns: int
    by_process: tuple[float, ...]  # ratio in each process

    @property
    def noisy(self) -> bool:
        """Whether the ratio is not known to 5%, by its interval, or because the processes disagree."""
        if any(abs(ratio - self.ratio) > MAX_ERROR * self.ratio for ratio in self.by_process):
            return True
        if self.interval is None:
            return True
        return max(self.ratio - self.interval[0], self.interval[1] - self.ratio) > MAX_ERROR * self.ratio


def clock(device: torch.device) -> float:
    """Time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def autocast(device: torch.device):
    """bfloat16 on CUDA, where experts then use grouped_mm; no autocast on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def time_in_turns(competitors: dict[str, Callable[[], object]], device: torch.device, effort: Effort) -> Times:
    """Time the competitors in turns, after two turns of warm-up."""
    names = list(competitors)
    calls = CALLS_ON_CUDA if device.type == "cuda" else 1
    times: Times = {name: [] for name in names}
    began = time.perf_counter()
    turn = -2
    while turn < effort.least or (turn < effort.most and time.perf_counter() - began < effort.seconds):
        if turn == 0:
            began = time.perf_counter()
        for name in names if turn % 2 == 0 else reversed(names):
            start = clock(device)
            for _ in range(calls):
                competitors[name]()
            if turn >= 0:
                times[name].append((clock(device) - start) * 1000 / calls)
        turn += 1
    return times


def rows(processes: list[Times], names: Sequence[str] | None = None) -> list[Row]:
    """Compare all competitors, or those named, with the first of them, over the turns of all processes."""
    names = names or list(processes[0])
    found = []
    for name in names:
        by_process = [sorted(a / b for a, b in zip(times[name], times[names[0]])) for times in processes]
        ratios = sorted(ratio for of_process in by_process for ratio in of_process)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        median_ms = statistics.median(ms for times in processes for ms in times[name])
        medians = tuple(map(statistics.median, by_process))
        found.append(Row(name, median_ms, middle, low, high, median_interval(ratios), len(ratios), medians))
    return found


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """95% confidence interval of the median, by order statistics; None with fewer than 6 values."""
    n = len(values)
    chance, rank = 0.0, 0
    while (chance := chance + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return (sorted(values)[rank - 1], sorted(values)[n - rank]) if rank else None


@contextmanager
def stopwatch(device: torch.device, places: Sequence[tuple[object, str]]) -> Iterator[dict[str, float]]:
    """Measure the seconds spent in functions, given as (owner, attribute). Synchronizes with a GPU at each call."""
    spent = {name: 0.0 for _, name in places}

    def timed(name: str, function: Callable):
        def call(*args, **kwargs):
            start = clock(device)
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += clock(device) - start

        return call

    with replaced({(owner, name): timed(name, getattr(owner, name)) for owner, name in places}):
        yield spent


@contextmanager
def replaced(functions: dict[tuple[object, str], Callable]) -> Iterator[None]:
    """Replace attributes, given as (owner, name), while the context is open."""
    originals = {place: getattr(*place) for place in functions}
    try:
        for place, function in functions.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in originals.items():
            setattr(*place, function)


def format_ratio(row: Row) -> str:
    """The ratio of a row, with its quartiles and notes."""
    note = "" if not row.noisy else "   too few turns" if row.interval is None else "   noisy: not known to 5%"
    if len(row.by_process) > 1:
        note = f"   by process {', '.join(f'{ratio:.2f}' for ratio in row.by_process)}{note}"
    return f"{row.ratio:6.3f} ({row.low:.3f} to {row.high:.3f}){note}"


def format_number(value: float) -> str:
    """Whole numbers with all digits, others with four."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def as_json(row: Row) -> dict:
    return vars(row) | {"noisy": row.noisy}


class Report:
    """Prints tables as they are ready, and collects them for --json.

    Args:
        quiet: print to stderr, because stdout is for JSON.
        on_table: called with each table when it is added.
    """

    def __init__(self, quiet: bool = False, on_table: Callable[[dict], object] = lambda table: None):
        self.quiet = quiet
        self.on_table = on_table
        self.tables: list[dict] = []

    def _add(self, table: dict) -> None:
        self.tables.append(table)
        self.on_table(table)

    def info(self, line: str) -> None:
        """Print a line."""
        print(line, file=sys.stderr if self.quiet else sys.stdout, flush=True)

    def comparison(
        self, part: str, title: str, times: Times | list[Times], pairs: Sequence[tuple[str, str]] = (), **facts
    ) -> None:
        """Add a table of competitors, relative to the first.

        Args:
            part: name of the part.
            title: title of the table.
            times: of one process, or of several.
            pairs: competitors to compare in addition, if both took part.
            facts: more values for --json.
        """
        processes = times if isinstance(times, list) else [times]
        found = rows(processes)
        names = [row.name for row in found]
        others = {f"{a} / {b}": rows(processes, (b, a))[1] for a, b in pairs if a in names and b in names}
        width = max(28, *map(len, (*names, *others)))
        self.info(f"\n{title}\n  {'':{width}} {'median':>12}   ratio (quartiles)")
        for row in found:
            ratio = "    1" if row is found[0] else format_ratio(row)
            self.info(f"  {row.name:{width}} {row.median_ms:9.2f} ms   {ratio}")
        for name, row in others.items():
            self.info(f"  {name:{width}} {'':12}   {format_ratio(row)}")
        self.info(f"  {found[0].turns} turns" + (f" in {len(processes)} processes" if len(processes) > 1 else ""))
        table = {
            "rows": [as_json(row) for row in found],
            "pairs": {name: as_json(row) for name, row in others.items()},
        }
        self._add({"part": part, "title": title} | table | facts)

    def numbers(self, part: str, title: str, lines: list[tuple[str, float, str]], **facts) -> None:
        """Add a table of numbers: (name, value, unit)."""
        width = max(28, *(len(name) for name, _, _ in lines))
        self.info(f"\n{title}")
        for name, value, unit in lines:
            self.info(f"  {name:{width}} {format_number(value):>14} {unit}")
        numbers = [{"name": name, "value": value, "unit": unit} for name, value, unit in lines]
        self._add({"part": part, "title": title, "numbers": numbers} | facts)

    def checks(self, part: str, title: str, found: list[tuple[str, bool | None, str]]) -> None:
        """Add a table of checks: (name, whether it passed, detail). None instead of True or False: a fact."""
        checks = [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in found]
        self.info(f"\n{title}")
        for check in checks:
            self.info(f"  {check['name']:28} {verdict(check)}")
        self._add({"part": part, "title": title, "checks": checks})


def verdict(check: dict) -> str:
    """A check as text: its detail, preceded by 'ok' or 'failed'."""
    word = {True: "ok", False: "failed", None: ""}[check["ok"]]
    return ": ".join(filter(None, (word, check["detail"])))
