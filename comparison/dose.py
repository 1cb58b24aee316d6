"""Dose and response: runs with beta at several strengths against runs without, by seed.

A strength is a pair of chrono_eta and chrono_k_max. All strengths share the runs of arm `off`.
"""

from __future__ import annotations

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
from comparison.runs import Run, differing, expand, group_into_arms, load_runs
from comparison.tables import Table, as_text
from trainer.errors import UserError

ON, OFF = FIRST
STRENGTH = ("chrono_eta", "chrono_k_max")
NOTE = (
    "All rows share the runs with beta off. Nothing is tested, and the 95% intervals are not corrected for their "
    "number. They cover seeds, not the choice of validation text."
)
FLIPS = "share of the top-K set that beta changes"


@dataclass(frozen=True)
class Strength:
    """One strength of beta, compared with beta off. Nothing is tested: all strengths share the runs without beta."""

    eta: float
    k_max: float
    analysis: Analysis
    flips: float  # FLIPS in the runs with beta, mean over seeds

    lost: int  # runs of this strength that cannot be used

    @property
    def rows(self) -> dict[str, Row]:
        """The contrasts on - off by outcome, the primary one first."""
        rows = (*self.analysis.primary, *self.analysis.described)
        return {r.outcome.name: r for r in rows if (r.a, r.b) == FIRST}


@dataclass(frozen=True)
class Dose:
    """All strengths, from the weakest."""

    strengths: list[Strength]
    left_out: list[str]  # a reason for each run that is left out
    command: str

    @property
    def outcomes(self) -> list[str]:
        """The outcomes that have a value at every strength, the primary one first."""
        return [name for name in self.strengths[0].rows if all(name in s.rows for s in self.strengths)]


def compare(folders: Iterable[Path], command: str) -> Dose:
    """Compare the runs in these folders. Raises UserError without pairs at two strengths or more."""
    runs, unusable = load_runs(expand(folders))
    off = [run for run in runs if run.arm == OFF]
    by_strength: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        if run.arm == ON:
            by_strength.setdefault((run.config["chrono_eta"], run.config["chrono_k_max"]), []).append(run)
    left_out = [str(e) for e in unusable]
    if by_strength:
        left_out += keep_one_condition(by_strength)
    left_out += [f"{run.name}: its arm is {run.arm!r}, not {ON!r} or {OFF!r}" for run in runs if run.arm not in FIRST]
    strengths = []
    for (eta, k_max), members in sorted(by_strength.items()):
        arms, _, reasons = group_into_arms([*off, *members])
        folders_of = {run.folder.parent for run in members if run.folder is not None}
        lost = sum(e.arm == ON and any(str(folder) in str(e) for folder in folders_of) for e in unusable)
        analysis = analyse(arms)
        left_out += [*reasons, *analysis.warnings]
        if analysis.row(FIRST) is not None and not analysis.confounders[FIRST]:
            flips = statistics.fmean(last_quarter(run, "flip_set") for run in arms[ON].values())
            strengths.append(Strength(eta, k_max, analysis, flips, lost))
    if len(strengths) < 2:
        why = f": {'; '.join(dict.fromkeys(left_out))}" if left_out else ""
        raise UserError(f"--dose needs pairs of runs, beta on and off, at two strengths of beta or more{why}")
    return Dose(strengths, list(dict.fromkeys(left_out)), command)


def keep_one_condition(by_strength: dict[tuple[float, float], list[Run]]) -> list[str]:
    """Remove the strengths whose runs differ from most others in more than the strength. Returns a reason for each."""

    def others(a: Run, b: Run) -> list[str]:
        return [key for key in differing(a.config, b.config) if key not in STRENGTH]

    first = {
        strength: next(iter(group_into_arms(members)[0][ON].values())) for strength, members in by_strength.items()
    }
    agreeing = {s: sum(not others(run, other) for other in first.values()) for s, run in first.items()}
    reference = first[max(agreeing, key=lambda s: agreeing[s])]
    reasons = []
    for strength, run in first.items():
        keys = others(run, reference)
        if keys:
            reasons.append(f"eta, k_max = {strength[0]:g}, {strength[1]:g}: its runs also differ in {', '.join(keys)}")
            del by_strength[strength]
    return reasons


def table(dose: Dose) -> Table:
    """The differences to beta off at each strength, with 95% intervals."""
    rows = []
    for s in dose.strengths:
        found = [s.rows[name] for name in dose.outcomes]
        lost = f", {s.lost} lost" if s.lost else ""
        rows.append([f"{s.eta:g}, {s.k_max:g}", f"{found[0].contrast.n}{lost}", *map(_cell, found), f"{s.flips:.3f}"])
    return Table(["eta, k_max", "pairs", *dose.outcomes, FLIPS], rows)


def _cell(r: Row) -> str:
    c = r.contrast
    interval = f" ({number(c.low)} to {number(c.high)})" if c.is_enough else ""
    return f"{number(c.mean)}{interval}"


def figure(dose: Dose) -> Figure:
    """Loss, Neff and changed choices against eta."""
    panels = []
    for name in (dose.outcomes[0], *(outcome for outcome in dose.outcomes if "Neff" in outcome)):
        rows = [
            {"eta": s.eta, "mean": s.rows[name].contrast.mean}
            | ({"low": c.low, "high": c.high} if (c := s.rows[name].contrast).is_enough else {})
            for s in dose.strengths
        ]
        dots = [{"eta": s.eta, "difference": d} for s in dose.strengths for d in s.rows[name].differences.values()]
        zero = chart([{"zero": 0}]).mark_rule(color="currentColor", opacity=0.5).encode(alt.Y("zero:Q", title=None))
        bars = chart([row for row in rows if "low" in row]).mark_rule(color=COLOURS[ON], strokeWidth=9, opacity=0.35)
        layers = [
            zero,
            bars.encode(_eta_axis(), alt.Y("low:Q", title=None), alt.Y2("high")),
            chart(dots).mark_circle(color=COLOURS[ON], size=25).encode(_eta_axis(), alt.Y("difference:Q", title=None)),
            chart(rows).mark_line(color=COLOURS[ON]).encode(_eta_axis(), alt.Y("mean:Q", title=None)),
        ]
        unit = dose.strengths[0].rows[name].outcome.unit
        panels.append(alt.layer(*layers).properties(height=200, title=f"{name}, {unit}: on - off"))
    flips = [{"eta": s.eta, "share": s.flips} for s in dose.strengths]
    line = chart(flips).mark_line(point=True, color=COLOURS[ON]).encode(_eta_axis(), alt.Y("share:Q", title=None))
    panels.append(line.properties(height=200, title=FLIPS))
    caption = "Dots: pairs. Line and bar: mean and 95% interval. The table has the k_max of each eta."
    return Figure("Dose and response", caption, panels, 1)


def _eta_axis() -> alt.X:
    return alt.X("eta:Q", title="chrono_eta", scale=alt.Scale(type="log"), axis=alt.Axis(grid=False))


def as_json(dose: Dose) -> dict[str, Any]:
    """All numbers: each difference by seed, and its statistics."""

    def row(r: Row) -> dict[str, Any]:
        c = r.contrast
        numbers = {"n": c.n, "mean": c.mean, "sd": c.sd} | ({"low": c.low, "high": c.high} if c.is_enough else {})
        return {"outcome": r.outcome.name, "differences": r.differences} | numbers

    strengths = [
        {"eta": s.eta, "k_max": s.k_max, "lost": s.lost, FLIPS: s.flips, "rows": [*map(row, s.rows.values())]}
        for s in dose.strengths
    ]
    return {"command": dose.command, "date": str(date.today()), "strengths": strengths, "left_out": dose.left_out}


def write(out: Path, dose: Dose) -> None:
    """Write dose.md, dose.json and the figure into `out`. Raises UserError if a file cannot be written."""
    drawn = figure(dose)
    image = image_name("figures", drawn)
    left_out = ["", "Left out:", "", *(f"- {as_text(reason)}" for reason in dose.left_out)] if dose.left_out else []
    lines = [
        f"# {drawn.title}",
        "",
        f"`{dose.command}`, {date.today()}",
        "",
        *table(dose).as_markdown(),
        "",
        NOTE,
        *left_out,
    ]
    lines += ["", f"![{drawn.title}]({image})", "", drawn.caption]
    numbers = json.dumps(as_json(dose), indent=1)
    write_files(out, {image: png(drawn), "dose.md": "\n".join(lines) + "\n", "dose.json": numbers + "\n"})
