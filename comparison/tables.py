"""The tables of the report: results by arm, measures by arm, all contrasts, settings, how the runs were made."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from chronomoe.signals import SIGNALS
from comparison.analysis import (
    FIRST,
    POWER_COLUMN,
    PRIMARY,
    Analysis,
    Outcome,
    Row,
    detectable,
    last_quarter,
    number,
    why_no_verdict,
)
from comparison.runs import SHOWN, Arms, Run, confounders, effective, pairs
from trainer.arms import CUSTOM

COLUMNS = ["outcome", "contrast", "pairs", "mean difference", "95% interval", "p", "verdict", POWER_COLUMN]
FOLLOWS = {name: f"beta follows {signal.what}" for name, signal in SIGNALS.items()}
DRIVERS = FOLLOWS | {  # of beta, by arm
    "off": "beta stays 0",
    "on": FOLLOWS["coherence"],
    "load": f"{FOLLOWS['load']}; no auxiliary loss, no bridge, clean gates",
    CUSTOM: "other settings",
}
UNUSED = "-"  # a setting without effect in an arm


def as_text(text: str) -> str:
    """Text for a line of Markdown, in which names of runs and values of settings are not markup."""
    return re.sub(r"[\\`*<&\[|$~]", r"\\\g<0>", " ".join(text.split()))


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row."""

    columns: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        """Leave out the columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if i == 0 or any(row[i] for row in self.rows)]
        object.__setattr__(self, "columns", [self.columns[i] for i in kept])
        object.__setattr__(self, "rows", [[row[i] for i in kept] for row in self.rows])

    def as_markdown(self) -> list[str]:
        """The lines of the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return ["| " + " | ".join(map(as_text, cells)) + " |" for cells in lines]

    def as_lines(self) -> list[str]:
        """The table as text in columns."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
            for cells in (self.columns, *self.rows)
        ]


def _final_loss(run: Run) -> float:
    return run.series("val/loss")[1][-1]


def _last(name: str) -> Callable[[Run], float]:
    return lambda run: last_quarter(run, name)


MEASURES = (
    Outcome("final validation loss", "nats", _final_loss),
    Outcome(PRIMARY, "nats", _last("val/loss")),
    Outcome("JS divergence, clean against applied routing", "nats", _last("js")),
    Outcome("tokens whose first expert changed", "share", _last("flip")),
    Outcome("relevance r", "", _last("relevance")),
    Outcome("spread of beta in a layer", "", _last("spread")),
    Outcome("load CV", "", _last("load_cv")),
    Outcome("Neff", "experts", _last("neff")),
    Outcome("layer coherence", "", _last("layer")),
)


def by_arm(arms: Arms, analysis: Analysis) -> Table:
    """The outcome of each arm and its difference to 'off'."""
    reference = FIRST[1]
    rows = []
    for arm, members in arms.items():
        every = (*analysis.primary, *analysis.described)
        row = next((r for r in every if r.outcome is analysis.outcome and (r.a, r.b) == (arm, reference)), None)
        difference, interval, p = "", "", ""
        if arm != reference and reference in arms:
            of_pairs = [analysis.outcome.of(x) - analysis.outcome.of(y) for x, y in pairs(arms, arm, reference)[0]]
            is_known = of_pairs and all(map(math.isfinite, of_pairs))
            difference = number(statistics.fmean(of_pairs)) if is_known else ""
        if row is not None:
            c = row.contrast
            interval = f"{number(c.low)} to {number(c.high)}" if c.is_enough else ""
            p = cells(analysis, row)[COLUMNS.index("p")] or ("not tested" if c.is_enough else "")
        losses = ([outcome.of(run) for run in members.values()] for outcome in (MEASURES[0], analysis.outcome))
        rows.append([arm, str(len(members)), *map(_mean_and_sd, losses), difference, interval, p])
    columns = [
        "arm",
        "seeds",
        "final loss",
        analysis.outcome.name.removeprefix("mean validation "),
        f"difference to {reference}",
        "95% interval",
        "p",
    ]
    return Table(columns, rows)


def _mean_and_sd(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return UNUSED
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def measures(arms: Arms) -> dict[str, dict[str, float]]:
    """The mean over seeds of each measure, by name and arm. Measures that no run has are left out."""
    found = {}
    for outcome in MEASURES:
        values = {arm: [outcome.of(run) for run in members.values()] for arm, members in arms.items()}
        means = {arm: statistics.fmean(v) for arm, v in values.items() if all(map(math.isfinite, v))}
        if means:
            found[f"{outcome.name}, {outcome.unit}".removesuffix(", ")] = means
    return found


def rounded(x: float, sign: str = "") -> str:
    """x with four decimals, or in scientific notation if it is smaller than 0.001. sign: '+' shows that of x."""
    return format(x, f"{sign}.4f" if x == 0 or abs(x) >= 1e-3 else f"{sign}.1e")


def measures_by_arm(arms: Arms) -> Table:
    """`measures` as a table, with a column per arm, and one of the difference if only two arms can be compared."""
    other, one = next(iter(arms)), next(reversed(arms))
    has_difference = len(arms) == 2 and arms[one].keys() == arms[other].keys() and not confounders(arms, one, other)
    rows = [
        [name, *(rounded(means[arm]) if arm in means else UNUSED for arm in arms)]
        + [rounded(means[one] - means[other], "+") if has_difference and len(means) == 2 else ""]
        for name, means in measures(arms).items()
    ]
    return Table(["mean over seeds", *arms, f"{one} - {other}"], rows)


def short_verdict(analysis: Analysis, r: Row) -> str:
    """'effect', 'no effect', 'undecided', or 'none' for a row without a verdict."""
    if r not in analysis.primary or why_no_verdict(analysis, (r.a, r.b)) is not None:
        return "none"
    return "effect" if r.contrast.is_effect else "no effect" if r.contrast.is_equivalent else "undecided"


def cells(analysis: Analysis, r: Row) -> list[str]:
    """The cells of a row under COLUMNS."""
    c, judged = r.contrast, short_verdict(analysis, r)
    difference = f"{c.mean:+.4g} {r.outcome.unit}".strip()
    interval = f"{c.low:+.4g} to {c.high:+.4g}" if c.is_enough else ""
    p = "" if judged == "none" else f"{c.p:.3g}" if c.is_exact else f"{c.p:.3g} (sampled)"
    note = "confounded" if r.confounders else judged if r in analysis.primary else ""
    return [r.outcome.name, f"{r.a} - {r.b}", str(c.n), difference, interval, p, note, detectable(c)]


def settings(arms: Arms) -> tuple[Table, Table]:
    """(settings that differ between arms or runs, with a column per arm; settings that all runs share)."""
    runs = [(arm, effective(run.config, SHOWN)) for arm, members in arms.items() for run in members.values()]
    differ, shared = [], []
    for name in sorted(set().union(*(config for _, config in runs))):
        values = {arm: sorted({_text(c[name]) for a, c in runs if a == arm and name in c}) or [UNUSED] for arm in arms}
        texts = [", ".join(values[arm]) for arm in arms]
        if any(text != texts[0] for text in texts) or any(len(values[arm]) > 1 for arm in arms):
            differ.append([name, *texts])
        else:
            shared.append([name, texts[0]])
    return Table(["setting", *arms], differ), Table(["setting", "value"], shared)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def provenance(arms: Arms, command: str, date: str) -> Table:
    """Commit, machine, duration and command."""
    runs = [run for members in arms.values() for run in members.values()]

    def of_runs(key: str) -> str:
        return ", ".join(sorted({_text(run.config[key]) for run in runs if run.config.get(key) is not None}))

    times = [str(start["time"]) for run in runs for start in run.history if "time" in start]
    seconds = [s for run in runs if (s := training_seconds(run)) is not None]
    machine = [
        of_runs("platform"),
        of_runs("device"),
        *(f"{key} {of_runs(key)}" for key in ("python", "torch") if of_runs(key)),
    ]
    threads = f"{of_runs('threads')} threads" if of_runs("threads") else ""
    rows = [
        ["command", command],
        ["commit", of_runs("git_commit")],
        ["protocol", protocol_of(runs)],
        ["machine", "; ".join(part for part in (*machine, threads) if part)],
        ["started", f"{min(times)} (first run) to {max(times)} (last run)" if times else ""],
        ["training time", _duration(seconds)],
        ["report", date],
    ]
    return Table(["", ""], [row for row in rows if row[1]])


def protocol_warnings(arms: Arms) -> list[str]:
    """A warning if runs declare different protocols, or if one was not committed when a run began."""
    runs = [run for members in arms.values() for run in members.values()]
    files = {run.config.get("protocol") or "" for run in runs}
    if files == {""}:
        return []
    commits = {str(run.history[0].get("protocol_commit")) for run in runs}
    found = ["the runs declare different protocols"] if len(files) > 1 else []
    found += ["the protocol changed between the runs"] if len(files) == 1 and len(commits) > 1 else []
    uncommitted = any(commit == "None" or commit.endswith("-dirty") for commit in commits)
    return found + (["the protocol was not committed when a run began"] if uncommitted else [])


def protocol_of(runs: list[Run]) -> str:
    """The protocol that the runs declare, and its commit when each run began."""
    files = sorted({str(run.config["protocol"]) for run in runs if run.config.get("protocol")})
    declared = [run for run in runs if run.config.get("protocol")]
    commits = sorted({str(run.history[0].get("protocol_commit") or "not committed") for run in declared})
    return f"{', '.join(files)}, at the start of the runs: {', '.join(commits)}" if files else ""


def training_seconds(run: Run) -> float | None:
    """Seconds of training, without evaluations, from the logged times of steps; None if they are not logged."""
    steps, times = run.series("time/step_ms")
    return sum((step - before) * ms / 1000 for before, step, ms in zip([0, *steps], steps, times)) if steps else None


def _duration(seconds: list[float]) -> str:
    if not seconds:
        return ""
    middle, total = statistics.median(seconds), sum(seconds)
    return f"{_time(middle)} per run (median), {_time(total)} in total, without evaluations"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
