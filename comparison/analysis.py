"""What is compared, fixed before any run: one primary outcome, the secondary ones, and the contrasts between arms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from comparison.runs import Run, pairs
from comparison.statistics import ALPHA, FEWEST_PAIRS, POWER, Contrast, contrast, holm

PRIMARY = "mean validation loss of the last quarter"
CONTRASTS = (("on", "off"), ("on", "shuffled"))  # those of the primary outcome
OTHER_CONTRASTS = (("shuffled", "off"), ("load", "off"))  # shown beside them, without a verdict


@dataclass(frozen=True)
class Outcome:
    """A number that a run has, and its unit."""

    name: str
    unit: str
    of: Callable[[Run], float]


@dataclass(frozen=True)
class Row:
    """One contrast of one outcome. `corrected` is p after Holm's correction; None where there is none."""

    outcome: Outcome
    a: str
    b: str
    differences: dict[int, float]  # by seed
    contrast: Contrast
    corrected: float | None = None


def last_quarter(run: Run, ending: str) -> float:
    """Mean over the last quarter of the run, and over layers, of the metrics with that name or ending."""
    start = 0.75 * run.config["max_iters"]
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
    """(primary, secondary, check). The check says whether beta acted; it is no outcome, because beta selects for it."""
    target = max(run.series("val/loss")[1][-1] for run in runs)
    primary = Outcome(PRIMARY, "nats", lambda run: last_quarter(run, "val/loss"))
    secondary = [
        Outcome("final validation loss", "nats", lambda run: run.series("val/loss")[1][-1]),
        Outcome("mean Neff of the last quarter", "experts", lambda run: last_quarter(run, "neff")),
        Outcome("mean load CV of the last quarter", "", lambda run: last_quarter(run, "load_cv")),
        Outcome(f"steps to a validation loss of {target:.3f}", "steps", lambda run: steps_to_loss(run, target)),
    ]
    check = Outcome("mean layer coherence of the last quarter", "", lambda run: last_quarter(run, "layer"))
    return primary, secondary, check


def row(arms: dict[str, dict[int, Run]], outcome: Outcome, a: str, b: str) -> Row | None:
    """The contrast a - b of an outcome, or None with fewer than two pairs that have it."""
    both = [(run_a.seed, outcome.of(run_a) - outcome.of(run_b)) for run_a, run_b in pairs(arms, a, b)]
    differences = {seed: d for seed, d in both if math.isfinite(d)}
    if len(differences) < 2:
        return None
    return Row(outcome, a, b, differences, contrast(list(differences.values())))


def analyse(arms: dict[str, dict[int, Run]]) -> tuple[list[Row], list[Row], list[Row]]:
    """(primary, secondary, check) rows of every contrast whose arms are there; secondary p-values are corrected."""
    primary, secondary, check = outcomes([run for members in arms.values() for run in members.values()])

    def rows(outcome: Outcome, wanted: tuple) -> list[Row]:
        found = [row(arms, outcome, a, b) for a, b in wanted if a in arms and b in arms]
        return [r for r in found if r is not None]

    second = [r for outcome in secondary for r in rows(outcome, CONTRASTS)]
    second += rows(primary, OTHER_CONTRASTS)
    corrected = holm([r.contrast.p for r in second])
    second = [Row(r.outcome, r.a, r.b, r.differences, r.contrast, p) for r, p in zip(second, corrected)]
    return rows(primary, CONTRASTS), second, rows(check, CONTRASTS)


def verdict(r: Row) -> str:
    """One plain sentence on a contrast of the primary outcome."""
    c = r.contrast
    what = f"{r.a} against {r.b}: the {r.outcome.name} differs by {c.mean:+.4f} {r.outcome.unit}"
    if not c.enough:
        return (
            f"{what} over {c.n} pairs: no verdict, because {c.n} pairs cannot give a p below "
            f"{2 / 2**c.n:.3g}; it takes {FEWEST_PAIRS}."
        )
    numbers = f"95% interval {c.low:+.4f} to {c.high:+.4f}, exact p = {c.p:.3g}, {c.n} pairs"
    if c.found:
        return f"{what} ({numbers}): '{r.a}' {'lowers' if c.mean < 0 else 'raises'} the loss."
    return (
        f"{what} ({numbers}): no effect found; so many pairs find one of {c.smallest_found:.4f} {r.outcome.unit} "
        f"in {POWER:.0%} of studies."
    )


def same_against_same(arms: dict[str, dict[int, Run]], pairings: int = 1000) -> str | None:
    """A sentence on comparing `off` with `off` under other seeds: how often an effect is claimed that is not there.

    The `off` runs are paired at random, again and again. Such pairings share runs, so their claims are not independent:
    the share is a check of the test on real runs, with an uncertainty larger than their number suggests.
    """
    values = [last_quarter(run, "val/loss") for run in arms.get("off", {}).values()]
    n = len(values) // 2
    if n < FEWEST_PAIRS:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.permuted(np.tile(values, (pairings, 1)), axis=1)
    claims = np.mean([contrast(row[:n] - row[n : 2 * n]).found for row in drawn])
    return (
        f"off against off: of {pairings} random pairings of the {len(values)} runs into {n} pairs, {claims:.1%} claim "
        f"an effect where there is none; {ALPHA:.0%} are to be expected at most."
    )


def conclusion(primary: list[Row]) -> str:
    """What the two contrasts say together."""
    by_arms = {(r.a, r.b): r for r in primary}
    against_off, against_shuffled = (by_arms.get(pair) for pair in CONTRASTS)
    if against_off is None or not against_off.contrast.enough:
        return "No verdict: there are too few pairs of runs with beta on and off."
    if not against_off.contrast.found:
        return "No effect of beta on the validation loss was found."
    effect = "lowers" if against_off.contrast.mean < 0 else "raises"
    if against_shuffled is None or not against_shuffled.contrast.enough:
        return f"Beta {effect} the validation loss; whether coherence is the cause is open without the shuffled arm."
    same_way = against_shuffled.contrast.mean * against_off.contrast.mean > 0
    if against_shuffled.contrast.found and same_way:
        return f"Beta {effect} the validation loss, and more than a beta that follows another expert's coherence."
    return (
        f"Beta {effect} the validation loss, but no more than a beta that follows another expert's coherence: "
        "coherence was not shown to be the cause."
    )
