"""Dose and response: runs with beta at several strengths against runs without, by seed.

A strength is a pair of chrono_eta and chrono_k_max. All strengths share the runs of arm `off`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import altair as alt

from comparison.analysis import FIRST, Analysis, Row, analyse, last_quarter, number
from comparison.figures import COLOURS, Figure, chart, png
from comparison.report import image_name, write_files
from comparison.runs import Run, expand, group_into_arms, load_runs
from comparison.tables import Table, as_text
from trainer.errors import UserError

ON, OFF = FIRST
FLIPS = "share of the top-K set that beta changes"


@dataclass(frozen=True)
class Strength:
    """One strength of beta, compared with beta off."""

    eta: float
    k_max: float
    analysis: Analysis
    flips: float  # FLIPS in the runs with beta, mean over seeds

    @property
    def rows(self) -> list[Row]:
        """The contrasts on - off, the primary outcome first."""
        rows = (*self.analysis.primary, *self.analysis.described)
        return [r for r in rows if (r.a, r.b) == FIRST]


@dataclass(frozen=True)
class Dose:
    """All strengths, from the weakest."""

    strengths: list[Strength]
    left_out: list[str]  # a reason for each run that is left out
    command: str


def compare(folders: Iterable[Path], command: str) -> Dose:
    """Compare the runs in these folders. Raises UserError without pairs at two strengths or more."""
    runs, unusable = load_runs(expand(folders))
    off = [run for run in runs if run.arm == OFF]
    by_strength: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        if run.arm == ON:
            by_strength.setdefault((run.config["chrono_eta"], run.config["chrono_k_max"]), []).append(run)
    left_out = [str(e) for e in unusable]
    left_out += [f"{run.name}: its arm is {run.arm!r}, not {ON!r} or {OFF!r}" for run in runs if run.arm not in FIRST]
    strengths = []
    for (eta, k_max), members in sorted(by_strength.items()):
        arms, _, reasons = group_into_arms([*off, *members])
        analysis = analyse(arms)
        left_out += [*reasons, *analysis.warnings]
        if analysis.row(FIRST) is not None and not analysis.confounders[FIRST]:
            flips = statistics.fmean(last_quarter(run, "flip_set") for run in arms[ON].values())
            strengths.append(Strength(eta, k_max, analysis, flips))
    if len(strengths) < 2:
        why = f": {'; '.join(dict.fromkeys(left_out))}" if left_out else ""
        raise UserError(f"--dose needs pairs of runs, beta on and off, at two strengths of beta or more{why}")
    return Dose(strengths, list(dict.fromkeys(left_out)), command)


def table(dose: Dose) -> Table:
    """The differences to beta off at each strength, with 95% intervals."""
    names = [r.outcome.name for r in dose.strengths[0].rows]
    rows = [
        [f"{s.eta:g}, {s.k_max:g}", str(s.rows[0].contrast.n), *map(_cell, s.rows), f"{s.flips:.3f}"]
        for s in dose.strengths
    ]
    return Table(["eta, k_max", "pairs", *names, FLIPS], rows)


def _cell(r: Row) -> str:
    c = r.contrast
    interval = f" ({number(c.low)} to {number(c.high)})" if c.is_enough else ""
    return f"{number(c.mean)}{interval}"


def figure(dose: Dose) -> Figure:
    """Loss, Neff and changed choices against eta."""
    panels = []
    for index, unit in ((0, "nats"), (_index_of(dose, "Neff"), "experts")):
        rows = [
            {"eta": s.eta, "mean": s.rows[index].contrast.mean}
            | ({"low": c.low, "high": c.high} if (c := s.rows[index].contrast).is_enough else {})
            for s in dose.strengths
        ]
        dots = [{"eta": s.eta, "difference": d} for s in dose.strengths for d in s.rows[index].differences.values()]
        zero = chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(alt.Y("zero:Q", title=None))
        bars = chart([row for row in rows if "low" in row]).mark_rule(color=COLOURS[ON], strokeWidth=9, opacity=0.35)
        layers = [
            zero,
            bars.encode(_eta_axis(), alt.Y("low:Q", title=None), alt.Y2("high")),
            chart(dots).mark_circle(color=COLOURS[ON], size=25).encode(_eta_axis(), alt.Y("difference:Q", title=None)),
            chart(rows).mark_line(color=COLOURS[ON]).encode(_eta_axis(), alt.Y("mean:Q", title=None)),
        ]
        name = dose.strengths[0].rows[index].outcome.name
        panels.append(alt.layer(*layers).properties(height=200, title=f"{name}, {unit}: on - off"))
    flips = [{"eta": s.eta, "share": s.flips} for s in dose.strengths]
    line = chart(flips).mark_line(point=True, color=COLOURS[ON]).encode(_eta_axis(), alt.Y("share:Q", title=None))
    panels.append(line.properties(height=200, title=FLIPS))
    caption = "Dots: pairs. Line and bar: mean and 95% interval. k_max rises with eta."
    return Figure("Dose and response", caption, panels, 1)


def _index_of(dose: Dose, word: str) -> int:
    return next(i for i, r in enumerate(dose.strengths[0].rows) if word in r.outcome.name)


def _eta_axis() -> alt.X:
    return alt.X("eta:Q", title="chrono_eta", scale=alt.Scale(type="log"), axis=alt.Axis(grid=False))


def as_json(dose: Dose) -> dict[str, Any]:
    """All numbers: each difference by seed, and its statistics."""

    def row(r: Row) -> dict[str, Any]:
        return {"outcome": r.outcome.name, "differences": r.differences} | dataclasses.asdict(r.contrast)

    strengths = [
        {"eta": s.eta, "k_max": s.k_max, FLIPS: s.flips, "rows": [row(r) for r in s.rows]} for s in dose.strengths
    ]
    return {"command": dose.command, "date": str(date.today()), "strengths": strengths, "left_out": dose.left_out}


def write(out: Path, dose: Dose) -> None:
    """Write dose.md, dose.json and the figure into `out`. Raises UserError if a file cannot be written."""
    drawn = figure(dose)
    image = image_name("figures", drawn)
    left_out = ["", "Left out:", "", *(f"- {as_text(reason)}" for reason in dose.left_out)] if dose.left_out else []
    lines = [f"# {drawn.title}", "", f"`{dose.command}`, {date.today()}", "", *table(dose).as_markdown(), *left_out]
    lines += ["", f"![{drawn.title}]({image})", "", drawn.caption]
    numbers = json.dumps(as_json(dose), indent=1)
    write_files(out, {image: png(drawn), "dose.md": "\n".join(lines) + "\n", "dose.json": numbers + "\n"})
