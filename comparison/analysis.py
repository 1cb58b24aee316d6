"""What is compared, fixed before any run, and what may be said of it.

One outcome has a verdict: the validation loss. Its two contrasts are tested in a fixed sequence, `on` against `off` at
5%, and `on` against `shuffled` at 5% only where the first found an effect. So a study without any effect claims one in
at most 5% of cases. Everything else is described by intervals and has no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from comparison.runs import Arms, Run, confounders, other_machine, pairs
from comparison.statistics import FEWEST_PAIRS, MOST_PAIRS, POWER, Contrast, contrast, pairs_needed

PRIMARY = "mean validation loss of the last quarter"
FIRST, SECOND = ("on", "off"), ("on", "shuffled")  # contrasts of the primary outcome, in their order
OTHERS = (("shuffled", "off"), ("load", "off"))  # contrasts that are described


@dataclass(frozen=True)
class Outcome:
    """A number that a run has, and its unit."""

    name: str
    unit: str
    of: Callable[[Run], float]


@dataclass(frozen=True)
class Row:
    """One contrast of one outcome."""

    outcome: Outcome
    a: str
    b: str
    differences: dict[int, float]  # by seed
    contrast: Contrast
    confounders: list[str]  # settings in which the arms differ besides those that define them


@dataclass(frozen=True)
class Analysis:
    """Every contrast of a comparison."""

    primary: list[Row]  # FIRST and SECOND, those whose arms are there
    described: list[Row]  # other contrasts of the primary outcome, then other outcomes
    check: list[Row]  # layer coherence, which says whether beta acted
    mixed_pairs: list[str]  # a line for each pair that is left out
    rounding: list[str]  # a line for each two arms that ran on other machines throughout
    lost: dict[str, set[str]]  # seeds of the runs that could not be used, by arm

    @property
    def warnings(self) -> list[str]:
        """What bears on all contrasts, a line each."""
        found = {(r.a, r.b): r.confounders for r in (*self.primary, *self.described) if r.confounders}
        differ = [
            f"'{a}' and '{b}' differ also in {', '.join(keys)}: no effect of the arm can be told from these"
            for (a, b), keys in found.items()
        ]
        return [*map(self.lost_runs, self.lost), *differ, *self.mixed_pairs, *self.rounding]

    def lost_runs(self, arm: str) -> str:
        """The sentence on the runs of an arm that could not be used."""
        seeds = ", ".join(sorted(self.lost[arm], key=lambda seed: (len(seed), seed)))
        return f"runs of '{arm}' could not be used (seed {seeds}), and what they would show is not known"

    def row(self, arms: tuple[str, str]) -> Row | None:
        return next((r for r in self.primary if (r.a, r.b) == arms), None)


def last_quarter(run: Run, ending: str) -> float:
    """Mean over the last quarter of the run, and over layers, of the metrics with that name or ending."""
    start = 0.75 * run.steps
    values = [
        value
        for line in run.lines
        if line["step"] > start
        for name, value in line.items()
        if (name == ending or name.endswith("/" + ending)) and value is not None
    ]
    return sum(values) / len(values) if values else math.nan


def steps_to_loss(run: Run, target: float) -> float:
    """Step at which the validation loss first reaches target, linear between evaluations; nan if it never does."""
    before = None
    for step, loss in zip(*run.series("val/loss")):
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return math.nan


def outcomes(runs: list[Run]) -> tuple[Outcome, list[Outcome], Outcome]:
    """(primary, others, check). The check says whether beta acted; it is no outcome, because beta selects for it."""
    target = max(run.series("val/loss")[1][-1] for run in runs)
    primary = Outcome(PRIMARY, "nats", lambda run: last_quarter(run, "val/loss"))
    others = [
        Outcome("final validation loss", "nats", lambda run: run.series("val/loss")[1][-1]),
        Outcome("mean Neff of the last quarter", "experts", lambda run: last_quarter(run, "neff")),
        Outcome("mean load CV of the last quarter", "", lambda run: last_quarter(run, "load_cv")),
        Outcome(f"steps to a validation loss of {target:.3f}", "steps", lambda run: steps_to_loss(run, target)),
    ]
    check = Outcome("mean layer coherence of the last quarter", "", lambda run: last_quarter(run, "layer"))
    return primary, others, check


def margin_of(arms: Arms, a: str, b: str) -> float | None:
    """The margin that the runs of both arms declare; None if they declare none, or not the same."""
    margins = {run.config.get("margin") for arm in (a, b) for run in arms[arm].values()}
    return margins.pop() if len(margins) == 1 else None


def analyse(arms: Arms, lost: dict[str, set[str]] | None = None) -> Analysis:
    """All contrasts whose arms are there and have two pairs or more. lost: as in Analysis."""
    primary, others, check = outcomes([run for members in arms.values() for run in members.values()])
    mixed: list[str] = []

    differ = {(a, b): confounders(arms, a, b) for a, b in (FIRST, SECOND, *OTHERS) if a in arms and b in arms}

    def rows(outcome: Outcome, wanted: tuple[tuple[str, str], ...]) -> list[Row]:
        return [r for pair in wanted if pair in differ and (r := row(outcome, *pair)) is not None]

    def row(outcome: Outcome, a: str, b: str) -> Row | None:
        good, different_code = pairs(arms, a, b)
        mixed.extend(line for line in different_code if line not in mixed)
        both = {x.seed: outcome.of(x) - outcome.of(y) for x, y in good}
        found = {seed: difference for seed, difference in both.items() if math.isfinite(difference)}
        if len(found) < 2:
            return None
        margin = margin_of(arms, a, b) if outcome is primary else None
        return Row(outcome, a, b, found, contrast(list(found.values()), margin), differ[a, b])

    described = rows(primary, OTHERS)
    described += [r for outcome in others for r in rows(outcome, (FIRST, SECOND))]
    rounding = [line for a, b in differ if (line := other_machine(arms, a, b))]
    tested = rows(primary, (FIRST, SECOND))
    return Analysis(tested, described, rows(check, (FIRST, SECOND)), mixed, rounding, lost or {})


def no_verdict(analysis: Analysis, arms: tuple[str, str]) -> str | None:
    """Why a contrast of the primary outcome has no verdict, or None if it has one."""
    r = analysis.row(arms)
    if any(analysis.lost.get(arm) for arm in arms):
        return "; ".join(analysis.lost_runs(arm) for arm in arms if analysis.lost.get(arm))
    if r is None:
        return f"there are fewer than two pairs of runs of '{arms[0]}' and '{arms[1]}' that can be compared"
    if r.confounders:
        return f"'{r.a}' and '{r.b}' differ also in {', '.join(r.confounders)}"
    if not r.contrast.enough:
        n = r.contrast.n
        return f"{n} pairs cannot give a p below {2 / 2**n:.3g}; it takes {FEWEST_PAIRS}"
    if arms == SECOND and (no_verdict(analysis, FIRST) is not None or not analysis.row(FIRST).contrast.found):
        return f"it is tested only where '{FIRST[0]}' against '{FIRST[1]}' finds an effect"
    return None


def verdict(analysis: Analysis, r: Row) -> str:
    """One plain sentence on a contrast of the primary outcome."""
    c = r.contrast
    what = f"{r.a} against {r.b}: the {r.outcome.name} differs by {number(c.mean)} {r.outcome.unit} over {c.n} pairs"
    if c.enough:
        what += f" (95% interval {number(c.low)} to {number(c.high)})"
    reason = no_verdict(analysis, (r.a, r.b))
    if reason is not None:
        return f"{what}. No verdict: {reason}."
    p = f"{'exact' if c.exact else 'sampled'} p = {c.p:.3g}"
    if c.found:
        size = f", by less than the margin of {c.margin:g}" if c.equivalent else ""
        return f"{what}. An effect ({p}): the loss is {_direction(c)} with '{r.a}' than with '{r.b}'{size}."
    if c.equivalent:
        return (
            f"{what}. No effect larger than the margin of {c.margin:g} {r.outcome.unit}: two one-sided tests, "
            f"p = {c.p_equivalence:.3g}, 90% interval {number(c.inner_low)} to {number(c.inner_high)}."
        )
    return f"{what}. Undecided ({p}): {what_would_decide(c)}."


def number(value: float) -> str:
    """A difference in nats, with its sign: four decimals, or two digits if it is smaller than those can show."""
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"


def _direction(c: Contrast) -> str:
    return "lower" if c.mean < 0 else "higher"


def what_would_decide(c: Contrast) -> str:
    """How many pairs would turn an undecided contrast into one of the other two verdicts, in words."""
    if c.margin is None:
        return "the runs declare no margin, so that there is no effect cannot be shown"
    n, low, high = c.pairs_to_decide
    if n is None or n > c.n:
        between = " to ".join(_pairs(k).removeprefix("about ") for k in (low, high))
        return f"by the spread of these pairs, {_pairs(n)} pairs ({between}) decide about {c.margin:g} nats"
    n = pairs_needed(c.sd, c.margin, c.mean)
    if n is not None and n <= c.n:
        return "it takes more pairs, and how many cannot be told from these"
    return f"{_pairs(n)} pairs decide, if the effect is as large as it seems from these"


def _pairs(n: int | None) -> str:
    return f"over {MOST_PAIRS}" if n is None else f"about {n}"


def conclusion(analysis: Analysis) -> str:
    """The verdict in one sentence."""
    first, second = analysis.row(FIRST), analysis.row(SECOND)
    reason = no_verdict(analysis, FIRST)
    if reason is not None:
        return f"No verdict: {reason}."
    c = first.contrast
    if not c.found:
        if c.equivalent:
            return f"Beta has no effect on the validation loss larger than the margin of {c.margin:g} nats."
        return f"Undecided: beta may lower the validation loss, raise it or do neither; {what_would_decide(c)}."
    effect = f"Beta {'lowers' if c.mean < 0 else 'raises'} the validation loss"
    effect += f", by less than the margin of {c.margin:g} nats" if c.equivalent else ""
    reason = no_verdict(analysis, SECOND)
    if reason is not None:
        return f"{effect}; whether coherence is the cause is open ({SECOND[0]} against {SECOND[1]}: {reason})."
    placebo = "a beta that follows another expert's coherence"
    if second.contrast.found:
        return f"{effect}, and the loss is {_direction(second.contrast)} than with {placebo}."
    if second.contrast.equivalent:
        return (
            f"{effect}. {placebo.capitalize()} gives the same loss within the margin of {c.margin:g} nats, so "
            "coherence is not the cause of more than that."
        )
    return f"{effect}; whether the loss differs from that with {placebo} is undecided."


def planning_figure(c: Contrast) -> str:
    """The effect that so many pairs find in 80% of studies, with the uncertainty of the spread; empty below 6 pairs."""
    if not c.enough:
        return ""
    value, low, high = c.planning
    return f"{value:.3g} ({low:.2g} to {high:.2g})"


POWER_COLUMN = f"effect found in {POWER:.0%} of studies"
