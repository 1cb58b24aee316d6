"""What an audit has found: for each arm its runs, the statistics over them, and sentences."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from auditing.agreement import (
    KNOWN,
    Agreement,
    Proposal,
    added_to_router,
    against_rivals,
    agreements,
    proposals,
    roc,
    roc_area,
    verdict,
)
from auditing.criteria import PRIMARY
from auditing.damage import Detection, Moved, detections
from auditing.healing import Healing
from auditing.measure import RELIABLE, Measured
from auditing.routing import Picture
from auditing.subsets import MaskedSets
from chronomoe.lifecycle import REASONS
from comparison.statistics import MIN_PAIRS, Contrast

UNMEASURED = "phi was not measured in training (step 2 was off)."
EVERY = 10  # steps between the changes after a damage that audit.json holds


@dataclass(frozen=True)
class AuditedRun:
    """What was measured on one run."""

    measured: Measured
    picture: Picture
    masked_sets: list[MaskedSets]  # empty without a subset search
    healing: list[Healing]  # empty without --heal
    moved: list[Moved]  # empty without --damage

    @property
    def name(self) -> str:
        return self.measured.run.name

    @cached_property
    def proposals(self) -> list[Proposal]:
        return proposals(self.measured)


@dataclass(frozen=True)
class Group:
    """The audited runs of one arm, which differ in their seed only."""

    arm: str
    runs: list[AuditedRun]

    @property
    def measured(self) -> list[Measured]:
        return [run.measured for run in self.runs]

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        return agreements(self.measured)

    @cached_property
    def agreements_zeroed(self) -> dict[str, Agreement]:
        return agreements(self.measured, zeroed=True)

    @cached_property
    def agreements_used(self) -> dict[str, Agreement]:
        """Without the experts that had no token of the validation batches: any look at the load finds those."""
        return agreements(self.measured, used=True)

    @property
    def unused(self) -> int:
        """Number of experts, over all runs, that had no token."""
        return sum(int((m.scores["load"] == 0).sum()) for m in self.measured)

    @cached_property
    def rivals(self) -> dict[str, Contrast]:
        """phi_slow minus each rival."""
        return against_rivals(self.agreements)

    @cached_property
    def added(self) -> Contrast | None:
        """phi_slow's partial rank correlation with worth, given what the router knows."""
        return added_to_router(self.measured)

    @cached_property
    def roc(self) -> list[dict[str, float]]:
        return roc(self.measured) if PRIMARY in self.agreements else []

    @cached_property
    def roc_area(self) -> Contrast | None:
        """Area under the ROC curve minus 1/2."""
        return roc_area(self.measured) if PRIMARY in self.agreements else None

    @cached_property
    def detections(self) -> list[Detection]:
        moved = [run.moved for run in self.runs if run.moved]
        return detections(moved) if moved else []

    @property
    def reliability(self) -> np.ndarray:
        """[R, L], see Measured."""
        return np.array([m.reliability for m in self.measured])

    @property
    def answer(self) -> str:
        """The answer to the primary question."""
        if len(self.runs) < MIN_PAIRS:
            return self._without_verdicts
        return _with_numbers(self.agreements[PRIMARY]) if PRIMARY in self.agreements else UNMEASURED

    @property
    def on_phi(self) -> list[str]:
        """What else is found on phi_slow and the prunes that it proposes."""
        return [*(self._comparisons if len(self.runs) >= MIN_PAIRS else []), *self._on_proposals]

    @property
    def on_others(self) -> list[str]:
        """The verdicts on the other criteria."""
        if len(self.runs) < MIN_PAIRS:
            return []
        return [_with_numbers(a) for name, a in self.agreements.items() if name != PRIMARY]

    @property
    def sentences(self) -> list[str]:
        """All findings in words."""
        return [*self.unreliable, self.answer, *self.on_phi, *self.on_others]

    @property
    def _comparisons(self) -> list[str]:
        found = []
        if self.unused and PRIMARY in self.agreements:
            found.append(f"{self._without_unused}.")
        for name, c in self.rivals.items():
            found.append(f"{PRIMARY} against {name}: {_comparison(PRIMARY, name, c)}.")
        if self.added is not None:
            known = " and ".join(KNOWN)
            says = "is not tested" if not self.added.is_enough else "is not shown to add anything"
            if self.added.is_effect:
                # see added_to_router
                says = (
                    "agrees with worth beyond their ranks, which do not hold all that the router knows"
                    if self.added.mean > 0
                    else "has the opposite sign"
                )
            found.append(f"Given {known}, {PRIMARY} {says}: {_numbers(self.added, 'partial rank correlation')}.")
        if self.roc_area is not None:
            found.append(f"Rule {PRIMARY} < threshold: the area under its ROC curve is {_area(self.roc_area)}.")
        return found

    @property
    def _without_verdicts(self) -> str:
        """The correlations, for fewer runs than a verdict needs."""
        means = {name: a.per_run[~np.isnan(a.per_run)] for name, a in self.agreements.items()}
        ordered = sorted(((m.mean(), name) for name, m in means.items() if len(m)), reverse=True)
        listed = ", ".join(f"{name} {mean:+.2f}" for mean, name in ordered) or "none is defined"
        runs = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        missing = "" if PRIMARY in self.agreements else f" {UNMEASURED}"
        return (
            f"No verdict, because it needs {MIN_PAIRS} runs. Rank correlations with worth in {runs}: {listed}.{missing}"
        )

    @property
    def _on_proposals(self) -> list[str]:
        """For each rule of step 5, what the prunes that it proposed would cost."""
        found = []
        for reason in REASONS:
            of_rule = [p for run in self.runs for p in run.proposals if p.reason == reason]
            if of_rule:
                few = sum(p.is_cheap for p in of_rule)
                still_open, costs = sum(p.is_open for p in of_rule), [p.worth for p in of_rule]
                found.append(
                    f"Prunes proposed for {reason.replace('_', ' ')}: {len(of_rule)}, open at the end: {still_open}. "
                    f"Cost: {min(costs):.4f} to {max(costs):.4f} nats. In the lowest quarter of their layer: {few}."
                )
        return found

    @property
    def _without_unused(self) -> str:
        experts = sum(m.worth.size for m in self.measured)
        of_used = self.agreements_used[PRIMARY]
        numbers = "" if of_used.pooled is None else f" ({_numbers(of_used.pooled, 'rank correlation')})"
        return f"Without the {self.unused} of {experts} experts that had no token, {of_used.sentence}{numbers}"

    @property
    def unreliable(self) -> list[str]:
        """A warning for each layer in which worth is not measured well enough."""
        blocks, least = self.measured[0].blocks, self.reliability.min(0)
        return [
            f"In L{block} the error of worth is not small against the differences between experts: reliability "
            f"{value:.2f} in the least reliable run, wanted {RELIABLE}. Give more --max_batches."
            for block, value in zip(blocks, least)
            if value < RELIABLE
        ]


def _numbers(c: Contrast, what: str) -> str:
    text = f"mean {what} {c.mean:+.2f} over {c.n} runs"
    return f"{text}, 95% interval {c.low:+.2f} to {c.high:+.2f}, p = {c.p:.3f}" if c.is_enough else text


def _with_numbers(a: Agreement) -> str:
    numbers = "" if a.pooled is None else f" ({_numbers(a.pooled, 'rank correlation')})"
    return f"{a.sentence}{numbers}."


def _comparison(a: str, b: str, c: Contrast) -> str:
    if not c.is_enough:
        says = "not tested"
    elif not c.is_effect:
        says = "no difference is shown"
    else:
        says = f"{a if c.mean > 0 else b} ranks better"
    return f"{says} ({_numbers(c, 'difference of the rank correlations')})"


def _area(c: Contrast) -> str:
    mean, low, high = (0.5 + x for x in (c.mean, c.low, c.high))
    interval = f", 95% interval {low:.2f} to {high:.2f}" if c.is_enough else ""
    return f"{mean:.2f} over {c.n} runs{interval}; 0.5 is chance"


def as_json(groups: list[Group], left_out: list[str], command: str, date: str) -> dict[str, Any]:
    """The content of audit.json: all numbers of the report."""
    return {"command": command, "date": date, "left_out": left_out, "arms": {g.arm: _group(g) for g in groups}}


def _group(g: Group) -> dict[str, Any]:
    by_name = {
        "agreement": g.agreements,
        "agreement_zeroed": g.agreements_zeroed,
        "agreement_used": g.agreements_used,
    }
    return {
        "sentences": g.sentences,
        **{
            key: {
                name: {
                    "verdict": verdict(a.pooled),
                    "by_layer": plain(a.by_layer),
                    "all_experts": plain(a.all_experts),
                    "pooled": plain(a.pooled),
                }
                for name, a in found.items()
            }
            for key, found in by_name.items()
        },
        "against": plain(g.rivals),
        "added_to_router": plain(g.added),
        "roc": plain(g.roc),
        "roc_area_minus_half": plain(g.roc_area),
        "detections": plain(g.detections),
        "runs": {run.name: _run(run) for run in g.runs},
    }


def _run(run: AuditedRun) -> dict[str, Any]:
    m = run.measured
    return {
        "seed": m.run.seed,
        "blocks": m.blocks,
        "batches": len(m.base),
        "loss": float(m.base.mean()),
        "worth": plain(m.worth),
        "error": plain(m.error),
        "worth_zeroed": plain(m.worth_zeroed),
        "reliability": plain(m.reliability),
        "scores": plain(m.scores),
        "proposals": plain(run.proposals),
        "masked_sets": [plain(r) | {"beaten": r.beaten} for r in run.masked_sets],
        "healing": plain(run.healing),
        "damage": [
            {"damage": case.damage, "layer": case.layer, "expert": case.expert}
            | {"change": {name: plain(change[EVERY - 1 :: EVERY]) for name, change in case.change.items()}}
            for case in run.moved
            if case.damage
        ],
        "coactivation": plain(run.picture.coactivation.numpy()),
        "share": plain(run.picture.share.numpy()),
        "saturation": plain(run.picture.saturation),
        "domains": plain({name: share.numpy() for name, share in run.picture.domains.items()}),
    }


def plain(value: Any) -> Any:
    """The value as JSON: arrays and dataclasses as lists and objects, None for a number that is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
