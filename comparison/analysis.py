"""Outcomes, contrasts and verdicts of a comparison, fixed before any run.

Only one outcome has a verdict: the validation loss; if the text changes on the way (`data_schedule`), the loss in the
first text after training on the second; if the strength of beta rises and falls (`chrono_ramp`), the difference of Neff
between the two branches. Its two contrasts are tested in a fixed sequence: `on` against `off` at 5%, then
`on` against `shuffled` at 5%, only if the first test finds an effect. So a study without any effect reports one in at
most 5% of cases. All other contrasts are described by intervals and have no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from chronomoe.schedule import parse_ramp, parse_schedule
from comparison.runs import Arms, Run, confounders, machine_difference, pairs
from comparison.statistics import MAX_PAIRS, MIN_PAIRS, POWER, Contrast, contrast, pairs_needed
from trainer.arms import ARMS
from trainer.settings import domain

PRIMARY = "mean validation loss of the last quarter"
FIRST, SECOND = ("on", "off"), ("on", "shuffled")  # tested contrasts of the primary outcome, in this order
UPPER_BOUND = "worth"  # the arm whose beta follows what coherence is meant to predict
CHANCE = (
    "runs with nearly the same routing diverge by chance and end 0.01 to 0.02 nats apart (seen with config/study.py "
    "and vertical_slice.py)"
)


@dataclass(frozen=True)
class Outcome:
    """A number computed from a run, and its unit."""

    name: str
    unit: str
    of: Callable[[Run], float]
    what: str = "validation loss"  # in the conclusion, for the primary outcome
    may_not_happen: bool = False  # a run without a value is not a run that lacks its logs


@dataclass(frozen=True)
class Row:
    """One contrast of one outcome: arm a minus arm b."""

    outcome: Outcome
    a: str
    b: str
    differences: dict[int, float]  # by seed
    contrast: Contrast
    confounders: list[str]  # settings in which the arms differ, except those that define them


@dataclass(frozen=True)
class Analysis:
    """All contrasts of a comparison."""

    outcome: Outcome  # the primary one
    primary: list[Row]  # FIRST and SECOND, if their arms exist
    described: list[Row]  # other contrasts of the primary outcome, then other outcomes
    check: list[Row]  # layer coherence, which shows whether beta acted
    mixed_pairs: list[str]  # a reason for each pair that is left out
    rounding: list[str]  # a warning for each two arms that ran on different machines
    lost: dict[str, set[str]]  # seeds of the runs that cannot be used, by arm
    single: dict[tuple[str, str], tuple[int, float]]  # (seed, difference in loss) of contrasts with one pair only
    confounders: dict[tuple[str, str], list[str]]  # by contrast; see Row
    missing: list[str]  # a warning for each row that has no value in some runs
    margins_differ: list[tuple[str, str]]  # contrasts whose arms declare different margins
    no_outcome: dict[tuple[str, str], list[int]]  # seeds whose runs have no value of the primary outcome, by contrast

    @property
    def warnings(self) -> list[str]:
        """Warnings about the contrasts as a whole."""
        compared = {(r.a, r.b) for r in (*self.primary, *self.described)} | self.single.keys()
        found = {arms: keys for arms, keys in self.confounders.items() if arms in compared and keys}
        differ = [
            f"'{a}' and '{b}' also differ in {', '.join(keys)}: an effect of the arm cannot be separated from these"
            for (a, b), keys in found.items()
        ]
        margins = [f"'{a}' and '{b}' declare different margins, so none is used" for a, b in self.margins_differ]
        return [*map(self.lost_runs, self.lost), *differ, *margins, *self.mixed_pairs, *self.rounding, *self.missing]

    def lost_runs(self, arm: str) -> str:
        """The warning about runs of an arm that cannot be used."""
        seeds = ", ".join(sorted(self.lost[arm], key=lambda seed: (len(seed), seed)))
        return f"runs of '{arm}' cannot be used (seed {seeds}), so their results are not known"

    def row(self, arms: tuple[str, str]) -> Row | None:
        """The row of a tested contrast."""
        return next((r for r in self.primary if (r.a, r.b) == arms), None)


def last_quarter(run: Run, name: str) -> float:
    """Mean of a metric over the last quarter of the run and over layers; NaN without values. See `Run.values`."""
    values = [value for of_layers in run.values(name, after=0.75 * run.steps).values() for value in of_layers]
    return sum(values) / len(values) if values else math.nan


def steps_to_loss(run: Run, target: float) -> float:
    """Step at which the validation loss first reaches target, linear between evaluations; NaN if it never does."""
    return first_crossing(zip(*run.series("val/loss")), target)


def first_crossing(series: Iterable[tuple[int, float]], target: float) -> float:
    """Step at which a loss first reaches target, linear between evaluations; NaN if it never does."""
    before = None
    for step, loss in series:
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return math.nan


@dataclass(frozen=True)
class Phase:
    """Steps of training on one text."""

    domain: str  # the name of the dataset in metrics
    start: int
    end: int

    def last_quarter(self, run: Run, domain: str) -> float:
        """Mean validation loss of a domain over the last quarter of this phase; NaN without values."""
        series = zip(*run.series(f"val/{domain}/loss"))
        values = [loss for step, loss in series if self.end - (self.end - self.start) / 4 < step <= self.end]
        return sum(values) / len(values) if values else math.nan


def phases(run: Run) -> list[Phase]:
    """The phases of a run's data_schedule that it has reached; empty without one."""
    schedule = run.config.get("data_schedule") or ""
    parts = [(domain(name), step) for name, step in parse_schedule(schedule) if step < run.steps] if schedule else []
    changes = [part for i, part in enumerate(parts) if i == 0 or part[0] != parts[i - 1][0]]
    ends = [step for _, step in changes[1:]] + [run.steps]
    return [Phase(name, start, end) for (name, start), end in zip(changes, ends)]


def shift_outcomes(first: Phase, second: Phase, third: Phase | None) -> tuple[Outcome, list[Outcome]]:
    """(primary, others) of runs whose text changes: what is forgotten of the first text, and how soon it comes back."""
    old, new = first.domain, second.domain

    def steps_back(run: Run) -> float:
        steps, losses = run.series(f"val/{old}/loss")
        before = dict(zip(steps, losses)).get(first.end, math.nan)
        after = [(step - second.end, loss) for step, loss in zip(steps, losses) if step >= second.end]
        return first_crossing(after, before)

    primary = Outcome(
        f"mean validation loss in {old} over the last quarter of the {new} phase",
        "nats",
        lambda run: second.last_quarter(run, old),
        f"loss in {old} after training on {new}",
    )
    others = [
        Outcome(
            f"rise of the loss in {old} from the last quarter of its first phase",
            "nats",
            lambda run: second.last_quarter(run, old) - first.last_quarter(run, old),
        ),
        Outcome(
            f"mean validation loss in {new} over the last quarter of its phase",
            "nats",
            lambda run: second.last_quarter(run, new),
        ),
    ]
    if third is not None and third.domain == old:
        others += [
            Outcome(
                f"steps on {old} until its loss is what it was before {new}", "steps", steps_back, may_not_happen=True
            ),
            Outcome(
                f"mean validation loss in {old} over the last quarter of its second phase",
                "nats",
                lambda run: third.last_quarter(run, old),
            ),
        ]
    return primary, others


LEVELS = [i / 10 for i in range(1, 10)]  # shares of the ramp's highest strength at which its branches are compared


def strengths(run: Run) -> tuple[list[int], list[float]]:
    """(steps, strength of beta in the forward of that step) at the logged steps of a run with a ramp.

    The forward of step s has the beta that step s - 1 set.
    """
    values, at = zip(*parse_ramp(run.config["chrono_ramp"]))
    steps = [line["step"] for line in run.lines]
    return steps, np.interp([step - 1 for step in steps], at, values).tolist()


def between_branches(run: Run, name: str) -> float:
    """Mean of a metric where the strength of beta falls, minus where it rises, at equal strengths; NaN without values.

    The mean is over LEVELS, and over layers. Between logged steps metric and strength are linear.
    """
    steps, strength = strengths(run)
    means = {step: sum(v) / len(v) for step, v in run.values(name).items()}
    points = [(s, means[step]) for step, s in zip(steps, strength) if step in means]
    top = max(range(len(points)), key=lambda i: points[i][0], default=0)
    rising, falling = points[: top + 1], points[top:][::-1]
    if min(len(rising), len(falling)) < 2:
        return math.nan
    highest = max(value for value, _ in parse_ramp(run.config["chrono_ramp"]))
    levels = [level * highest for level in LEVELS]
    if max(rising[0][0], falling[0][0]) > levels[0] or points[top][0] < levels[-1]:
        return math.nan
    down, up = (np.interp(levels, *zip(*branch)) for branch in (falling, rising))
    return float((down - up).mean())


def ramp_outcomes() -> tuple[Outcome, list[Outcome]]:
    """(primary, others) of runs whose strength of beta rises and falls."""

    def outcome(name: str, metric: str, unit: str) -> Outcome:
        return Outcome(
            f"{name} where beta's strength falls, minus where it rises",
            unit,
            lambda run: between_branches(run, metric),
            "difference of Neff between falling and rising strength",
        )

    return outcome("Neff", "neff", "experts"), [outcome("load CV", "load_cv", "")]


def is_ramp(run: Run) -> bool:
    """Whether the strength of beta rises and then falls in a run, within its steps."""
    ramp = run.config.get("chrono_ramp")
    values = [value for value, step in parse_ramp(ramp) if step <= run.steps] if ramp else []
    top = values.index(max(values)) if values else 0
    rising, falling = values[: top + 1], values[top:]
    return min(len(rising), len(falling)) > 1 and rising == sorted(rising) and falling == sorted(falling)[::-1]


def outcomes(runs: list[Run]) -> tuple[Outcome, list[Outcome], Outcome]:
    """(primary, others, check), from the runs of the tested contrast.

    The check shows whether beta acted. Beta selects for it, so it is not an outcome.
    """
    shared = phases(runs[0])
    if len(shared) > 1 and all(phases(run) == shared for run in runs):
        primary, others = shift_outcomes(shared[0], shared[1], shared[2] if len(shared) > 2 else None)
    elif all(is_ramp(run) for run in runs):
        primary, others = ramp_outcomes()
    else:
        primary, others = loss_outcomes(runs)
    others += [
        Outcome("mean Neff of the last quarter", "experts", lambda run: last_quarter(run, "neff")),
        Outcome("mean load CV of the last quarter", "", lambda run: last_quarter(run, "load_cv")),
    ]
    check = Outcome("mean layer coherence of the last quarter", "", lambda run: last_quarter(run, "layer"))
    return primary, others, check


def loss_outcomes(runs: list[Run]) -> tuple[Outcome, list[Outcome]]:
    """(primary, others) of runs on one text."""
    target = max(run.series("val/loss")[1][-1] for run in runs)
    primary = Outcome(PRIMARY, "nats", lambda run: last_quarter(run, "val/loss"))
    others = [
        Outcome("final validation loss", "nats", lambda run: run.series("val/loss")[1][-1]),
        Outcome(f"steps to a validation loss of {target:.3f}", "steps", lambda run: steps_to_loss(run, target)),
    ]
    return primary, others


def margin_of(arms: Arms, a: str, b: str) -> float | None:
    """The margin that the runs of both arms declare; None if they declare none or different ones."""
    margins = margins_of(arms, a, b)
    return margins.pop() if len(margins) == 1 else None


def margins_of(arms: Arms, a: str, b: str) -> set[float | None]:
    """The margins that the runs of two arms declare."""
    return {run.config.get("margin") for arm in (a, b) for run in arms[arm].values()}


def analyse(arms: Arms, lost: dict[str, set[str]] | None = None) -> Analysis:
    """All contrasts whose arms exist and have at least two pairs. lost: as in Analysis."""
    tested_arms = FIRST if all(arms.get(arm) for arm in FIRST) else tuple(arms)
    primary, others, check = outcomes([run for arm in tested_arms for run in arms[arm].values()])
    mixed: list[str] = []
    missing: list[str] = []
    no_outcome: dict[tuple[str, str], list[int]] = {}
    single: dict[tuple[str, str], tuple[int, float]] = {}
    others_to_off = tuple((arm, FIRST[1]) for arm in ARMS if arm not in FIRST)
    differ = {(a, b): confounders(arms, a, b) for a, b in (FIRST, SECOND, *others_to_off) if a in arms and b in arms}

    def rows(outcome: Outcome, contrasts: tuple[tuple[str, str], ...]) -> list[Row]:
        return [r for names in contrasts if names in differ and (r := row(outcome, *names)) is not None]

    def row(outcome: Outcome, a: str, b: str) -> Row | None:
        good, left_out = pairs(arms, a, b)
        mixed.extend(line for line in left_out if line not in mixed)
        all_differences = {x.seed: outcome.of(x) - outcome.of(y) for x, y in good}
        finite = {seed: difference for seed, difference in all_differences.items() if math.isfinite(difference)}
        without = sorted(all_differences.keys() - finite.keys())
        if without and outcome is primary:
            no_outcome[a, b] = without
            return None
        if without and finite:
            kept = "it is not compared" if outcome.may_not_happen else "these pairs are left out of it"
            missing.append(f"{a} - {b}: the {outcome.name} has no value for seed {_listed(without)}, so {kept}")
            if outcome.may_not_happen:
                return None
        if len(finite) < 2:
            if finite and outcome is primary:
                single[a, b] = next(iter(finite.items()))
            return None
        margin = margin_of(arms, a, b) if outcome is primary and outcome.unit == "nats" else None
        return Row(outcome, a, b, finite, contrast(list(finite.values()), margin), differ[a, b])

    described = rows(primary, others_to_off)
    has_shift = primary.name != PRIMARY
    described += [
        r for outcome in others for r in rows(outcome, (FIRST, SECOND, *(others_to_off if has_shift else ())))
    ]
    rounding = [line for a, b in differ if (line := machine_difference(arms, a, b))]
    tested = rows(primary, (FIRST, SECOND))
    checked = rows(check, (FIRST, SECOND))
    margins = [names for names in (FIRST, SECOND) if names in differ and len(margins_of(arms, *names)) > 1]
    return Analysis(
        primary, tested, described, checked, mixed, rounding, lost or {}, single, differ, missing, margins, no_outcome
    )


def why_no_verdict(analysis: Analysis, arms: tuple[str, str]) -> str | None:
    """The reason why a tested contrast has no verdict, or None if it has one."""
    r = analysis.row(arms)
    if any(analysis.lost.get(arm) for arm in arms):
        return "; ".join(analysis.lost_runs(arm) for arm in arms if analysis.lost.get(arm))
    if analysis.confounders.get(arms) and (r is not None or arms in analysis.single):
        return f"'{arms[0]}' and '{arms[1]}' also differ in {', '.join(analysis.confounders[arms])}"
    if analysis.no_outcome.get(arms):
        seeds = _listed(analysis.no_outcome[arms])
        return f"the outcome has no value in a run of '{arms[0]}' or '{arms[1]}' (seed {seeds})"
    if r is None and arms in analysis.single:
        return f"one pair of runs is no evidence: {CHANCE}; a verdict needs {MIN_PAIRS} pairs"
    if r is None:
        return f"there are fewer than two pairs of runs of '{arms[0]}' and '{arms[1]}' that can be compared"
    if not r.contrast.is_enough:
        return f"{r.contrast.n} pairs of runs are too few, a verdict needs {MIN_PAIRS}"
    if arms == SECOND and (why_no_verdict(analysis, FIRST) is not None or not analysis.row(FIRST).contrast.is_effect):
        return f"it is tested only if '{FIRST[0]}' against '{FIRST[1]}' has an effect"
    return None


def verdict(analysis: Analysis, r: Row) -> str:
    """The difference and the verdict of a tested contrast, in words."""
    c = r.contrast
    what = f"{r.a} against {r.b}: the {r.outcome.name} differs by {number(c.mean)} {r.outcome.unit} over {c.n} pairs"
    if c.is_enough:
        what += f" (95% interval {number(c.low)} to {number(c.high)})"
    reason = why_no_verdict(analysis, (r.a, r.b))
    if reason is not None:
        return f"{what}. No verdict: {reason}."
    p = f"{'exact' if c.is_exact else 'sampled'} p = {c.p:.3g}"
    if c.is_effect:
        size = f", by less than the margin of {c.margin:g}" if c.is_equivalent else ""
        it = "the loss" if r.outcome.unit == "nats" else "it"
        return f"{what}. An effect ({p}): {it} is {_direction(c)} with '{r.a}' than with '{r.b}'{size}."
    if c.is_equivalent:
        return (
            f"{what}. No effect larger than the margin of {c.margin:g} {r.outcome.unit}: two one-sided tests, "
            f"p = {c.p_equivalence:.3g}, 90% interval {number(c.inner_low)} to {number(c.inner_high)}."
        )
    return f"{what}. Undecided ({p}): {what_would_decide(c)}."


def single_pair(analysis: Analysis, a: str, b: str) -> str:
    """The difference of the only pair of two arms, in words. None is given if other settings differ too."""
    seed, difference = analysis.single[a, b]
    if analysis.confounders.get((a, b)):
        return f"{a} against {b}: the losses of the pair (seed {seed}) are not compared."
    what = f"{a} against {b}: the {analysis.outcome.name} differs by {number(difference)} {analysis.outcome.unit}"
    return f"{what} in one pair (seed {seed})."


def number(value: float) -> str:
    """A difference in nats with its sign: four decimals, or two digits if it is too small for these."""
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _direction(c: Contrast) -> str:
    return "lower" if c.mean < 0 else "higher"


def what_would_decide(c: Contrast) -> str:
    """The number of pairs that would decide an undecided contrast, in words."""
    if c.margin is None:
        return "the runs declare no margin, so the absence of an effect cannot be shown"
    n, low, high = c.pairs_to_decide
    if n is None or n > c.n:
        between = " to ".join(_pairs(k).removeprefix("about ") for k in (low, high))
        return f"by the standard deviation of these pairs, {_pairs(n)} pairs ({between}) decide about {c.margin:g} nats"
    n = pairs_needed(c.sd, c.margin, c.mean)
    if n is not None and n <= c.n:
        return "more pairs are needed, and these pairs do not show how many"
    return f"{_pairs(n)} pairs decide if the true effect is as large as the mean of these pairs"


def _pairs(n: int | None) -> str:
    return f"over {MAX_PAIRS}" if n is None else f"about {n}"


def conclusion(analysis: Analysis) -> str:
    """The verdict in one sentence."""
    first, second = analysis.row(FIRST), analysis.row(SECOND)
    reason = why_no_verdict(analysis, FIRST)
    if reason is not None:
        is_small = first is not None and not first.contrast.is_enough
        return f"No verdict: {reason}" + (f": {CHANCE}." if is_small else ".")
    c, what = first.contrast, analysis.outcome.what
    if not c.is_effect:
        if c.is_equivalent:
            return f"Beta has no effect on the {what} larger than the margin of {c.margin:g} nats."
        return f"Undecided: beta may lower the {what}, raise it or do neither; {what_would_decide(c)}."
    effect = f"Beta {'lowers' if c.mean < 0 else 'raises'} the {what}"
    effect += f", by less than the margin of {c.margin:g} nats" if c.is_equivalent else ""
    reason = why_no_verdict(analysis, SECOND)
    if reason is not None:
        return f"{effect}; whether coherence is the cause is not known ({SECOND[0]} against {SECOND[1]}: {reason})."
    placebo = "a beta that follows another expert's coherence"
    it = "the loss" if analysis.outcome.unit == "nats" else "it"
    if second.contrast.is_effect:
        return f"{effect}, and {it} is {_direction(second.contrast)} than with {placebo}."
    if second.contrast.is_equivalent:
        return (
            f"{effect}. {placebo.capitalize()} gives the same loss within the margin of {c.margin:g} nats, so "
            "coherence is not the cause of more than that."
        )
    return f"{effect}; whether {it} differs from that with {placebo} is undecided."


def upper_bound(analysis: Analysis) -> str | None:
    """What the arm whose beta follows the measured worth says about every signal.

    None without enough pairs, or if the outcome is not a loss.
    """
    contrast = (UPPER_BOUND, FIRST[1])
    r = next((r for r in analysis.described if (r.a, r.b) == contrast and r.outcome is analysis.outcome), None)
    is_lost = any(analysis.lost.get(arm) for arm in contrast)
    if r is None or not r.contrast.is_enough or r.confounders or is_lost or r.outcome.unit != "nats":
        return None
    c = r.contrast
    gain = (
        f"the interval excludes a gain larger than {-c.low:.4f} nats" if c.low < 0 else "the interval excludes a gain"
    )
    return (
        f"Upper bound: with a beta that follows the measured worth of the experts, the {r.outcome.name} differs by "
        f"{number(c.mean)} nats from '{r.b}' (95% interval {number(c.low)} to {number(c.high)}); {gain}, if the "
        "differences are symmetric about their mean. The worth is measured with errors; better values could gain more."
    )


POWER_COLUMN = f"effect detected in {POWER:.0%} of studies"


def detectable(c: Contrast) -> str:
    """The cell under POWER_COLUMN: the detectable effect with its 95% interval; empty with fewer than 6 pairs."""
    if not c.is_enough:
        return ""
    value, low, high = c.detectable
    return f"{value:.3g} ({low:.2g} to {high:.2g})"
