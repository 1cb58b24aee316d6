"""The number of pairs that a study needs, by the standard deviation of a pilot's pairs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comparison.analysis import FIRST, analyse, margin_of
from comparison.runs import expand, group_into_arms, load_runs
from comparison.statistics import MAX_PAIRS, POWER, pairs_needed
from trainer.errors import UserError


def plan(folders: Iterable[Path], margin: float | None) -> str:
    """The number of pairs that decide about a margin, in words.

    folders: of the pilot's runs. margin: in nats; None: the one that the runs declare. Raises UserError if there is no
    margin, or fewer than two pairs.
    """
    runs, unusable = load_runs(expand(folders))
    left_out = [str(e) for e in unusable]
    arms = group_into_arms(runs)[0] if runs else {}
    if not all(arm in arms for arm in FIRST):
        raise UserError("; ".join(left_out) or "--plan needs folders with pairs of runs, beta on and off")
    margin = margin_of(arms, *FIRST) if margin is None else margin
    if margin is None:
        raise UserError("--plan needs --margin=NATS: the runs declare none")
    analysis = analyse(arms)
    row = analysis.row(FIRST)
    if row is None:
        raise UserError("--plan needs at least two pairs of runs, beta on and off, with the same seeds")
    c = row.contrast
    needed = (pairs_needed(sd, margin) for sd in (c.sd, *c.sd_interval))
    n, low, high = (f"over {MAX_PAIRS}" if pairs is None else str(pairs) for pairs in needed)
    lines = [
        f"{c.n} pairs of 'on' and 'off' differ with a standard deviation of {c.sd:.4f} nats "
        f"(95% interval {c.sd_interval[0]:.4f} to {c.sd_interval[1]:.4f})",
        f"{n} pairs ({low} to {high}) decide about a margin of {margin:g} nats: in {POWER:.0%} of studies they exclude "
        "an effect of this size if there is none, and detect it if there is one",
    ]
    return "\n".join([*analysis.warnings, *lines, *(f"left out: {reason}" for reason in left_out)])
