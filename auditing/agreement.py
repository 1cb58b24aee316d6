"""Does a criterion rank experts by their worth? The run is the unit: experts of one run are not independent.

For each run, Spearman's correlation of criterion and worth is computed in each layer and averaged over the layers.
Tests and intervals are those of the mean over runs, by the sign-flip test of comparison/statistics.py. If a criterion
knows nothing of worth, each correlation is as likely to have the opposite sign.

Shapes: R runs, L MoE layers, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from auditing.criteria import PRIMARY
from auditing.measure import Measured
from comparison.statistics import MIN_PAIRS, Contrast, contrast

RIVALS = ("load", "mean_gate", "reap")  # criteria that phi_slow is compared with
KNOWN = ("mean_gate", "load")  # what the router knows anyway
QUARTER = 4  # the rule should identify the experts of the lowest quarter of worth in their layer
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

Statistic = Callable[[np.ndarray, np.ndarray], float]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of a [E] and b [E], with mean ranks for ties; NaN if one of them is constant."""
    return _correlation(stats.rankdata(a), stats.rankdata(b))


def partial_rank_correlation(a: np.ndarray, b: np.ndarray, controls: Sequence[np.ndarray]) -> float:
    """Correlation of the ranks of a and b after the ranks of the controls are regressed out; NaN if nothing is left."""
    x = np.column_stack([np.ones(len(a)), *map(stats.rankdata, controls)])
    if len(a) < x.shape[1] + 2:
        return math.nan
    ranks = np.column_stack([stats.rankdata(a), stats.rankdata(b)])
    left = ranks - x @ np.linalg.lstsq(x, ranks, rcond=None)[0]
    spread = left.std(0)
    return math.nan if spread.min() < 1e-9 * len(a) else _correlation(*left.T)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    lengths = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / lengths) if lengths > 0 else math.nan


@dataclass(frozen=True)
class Agreement:
    """How a criterion agrees with worth, over runs."""

    criterion: str
    by_layer: np.ndarray  # [R, L] Spearman's correlation; NaN if undefined
    all_experts: np.ndarray  # [R] over the experts of all layers, ranked together
    pooled: Contrast | None  # of the mean over layers; None with fewer than two runs

    @property
    def per_run(self) -> np.ndarray:
        """[R] mean over the layers in which the correlation is defined."""
        return mean_over_layers(self.by_layer)

    @property
    def sentence(self) -> str:
        return f"{self.criterion} {verdict(self.pooled)}"


def mean_over_layers(values: np.ndarray) -> np.ndarray:
    """Mean of values [R, L] over layers, without NaN: [R]; NaN if all are."""
    defined = ~np.isnan(values)
    count = defined.sum(1)
    total = np.where(defined, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0)


def over_runs(values: np.ndarray) -> Contrast | None:
    """Statistics of one value per run, without NaN; None with fewer than two."""
    defined = values[~np.isnan(values)]
    return contrast(defined.tolist()) if len(defined) > 1 else None


def verdict(c: Contrast | None) -> str:
    """What the statistics of the correlations say, as the predicate of a sentence."""
    if c is None or not c.is_enough:
        count = "" if c is None else f", and its rank correlation is defined in {c.n}"
        return f"is not tested: a verdict needs {MIN_PAIRS} runs{count}"
    if not c.is_effect:
        return "is not shown to rank experts by worth"
    return f"ranks experts {'better' if c.mean > 0 else 'worse'} than chance"


def agreement(runs: Sequence[Measured], criterion: str, zeroed: bool = False, used: bool = False) -> Agreement:
    """The agreement of a criterion that all runs have.

    zeroed: worth is the rise with outputs set to zero. used: without the experts that had no token.
    """
    by_layer, together = [], []
    for run in runs:
        worth, score = run.worth_zeroed if zeroed else run.worth, run.scores[criterion]
        counted = run.scores["load"] > 0 if used else np.ones(worth.shape, dtype=bool)
        by_layer.append([rank_correlation(s[c], w[c]) for s, w, c in zip(score, worth, counted)])
        together.append(rank_correlation(score[counted], worth[counted]))
    values = np.array(by_layer)
    return Agreement(criterion, values, np.array(together), over_runs(mean_over_layers(values)))


def shared_criteria(runs: Sequence[Measured]) -> list[str]:
    """The criteria that all runs have."""
    return [name for name in runs[0].scores if all(name in run.scores for run in runs)]


def agreements(runs: Sequence[Measured], **options: bool) -> dict[str, Agreement]:
    """The agreement of every criterion that all runs have. options: of `agreement`."""
    return {name: agreement(runs, name, **options) for name in shared_criteria(runs)}


def against_rivals(found: dict[str, Agreement]) -> dict[str, Contrast]:
    """phi_slow minus each rival: paired differences of the correlations of the same run."""
    if PRIMARY not in found:
        return {}
    differences = {name: over_runs(found[PRIMARY].per_run - found[name].per_run) for name in RIVALS if name in found}
    return {name: c for name, c in differences.items() if c is not None}


def added_to_router(runs: Sequence[Measured]) -> Contrast | None:
    """phi_slow's partial rank correlation with worth, given mean gate and load; None if it is not defined.

    Ranks do not hold all that the router knows. If worth and phi_slow both follow gate and load, for example their
    product, the partial rank correlation is above 0 and the test rejects far more often than at its level. So it can
    show that phi_slow adds nothing that ranks can tell, but not that it adds something.
    """
    if PRIMARY not in shared_criteria(runs):
        return None
    by_layer = [
        [
            partial_rank_correlation(phi, worth, [run.scores[name][layer] for name in KNOWN])
            for layer, (phi, worth) in enumerate(zip(run.scores[PRIMARY], run.worth))
        ]
        for run in runs
    ]
    return over_runs(mean_over_layers(np.array(by_layer)))


def is_cheap(worth: np.ndarray) -> np.ndarray:
    """Which experts are in the lowest quarter of worth in their layer, with all that tie: [L, E] bool."""
    worth_less = (worth[:, None, :] < worth[:, :, None]).sum(-1)
    return worth_less < max(1, worth.shape[-1] // QUARTER)


def area_under_roc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a lower score than a negative; ties count half."""
    lower, higher = score[positive], score[~positive]
    if not (len(lower) and len(higher)):
        return math.nan
    return float((np.sign(higher[None] - lower[:, None]) / 2 + 0.5).mean())


def roc(runs: Sequence[Measured], criterion: str = PRIMARY) -> list[dict[str, float]]:
    """Share of the cheap experts and of the others that a rule `criterion < threshold` proposes, by threshold.

    Empty if all experts are worth the same.
    """
    score = np.concatenate([run.scores[criterion].ravel() for run in runs])
    cheap = np.concatenate([is_cheap(run.worth).ravel() for run in runs])
    if cheap.all():
        return []
    points = []
    for threshold in [*np.unique(score), math.inf]:
        proposed = score < threshold
        points.append({
            "threshold": float(threshold),
            "cheap": float(proposed[cheap].mean()),
            "others": float(proposed[~cheap].mean()),
        })  # fmt: skip
    return points


def roc_area(runs: Sequence[Measured], criterion: str = PRIMARY) -> Contrast | None:
    """The area under the ROC curve of each run, minus 1/2, over runs. The rule has one threshold for all layers."""
    areas = [area_under_roc(run.scores[criterion].ravel(), is_cheap(run.worth).ravel()) for run in runs]
    return over_runs(np.array(areas) - 0.5)


@dataclass(frozen=True)
class Proposal:
    """What a proposed prune would cost."""

    run: str
    expert: str
    reason: str
    step: int  # at which it was opened or withdrawn for the last time
    is_open: bool
    worth: float  # nats per token
    error: float  # its standard error
    worth_less: int  # number of other experts of the layer that are worth less
    others: int  # number of other experts of the layer
    is_cheap: bool  # in the lowest quarter of worth in its layer

    @property
    def sentence(self) -> str:
        count, others = (NUMBERS[n] if n < len(NUMBERS) else str(n) for n in (self.worth_less, self.others))
        verb, word = ("costs" if self.worth >= 0 else "gains"), ("is" if self.worth_less == 1 else "are")
        rank = f"{count if self.worth_less else 'none'} of the {others} others {word} worth less"
        if self.others == 1:
            rank = "the other is worth less" if self.worth_less else "the other is not worth less"
        return f"pruning {self.expert} {verb} {abs(self.worth):.3f} ± {self.error:.3f} nats; {rank}"


def proposals(run: Measured) -> list[Proposal]:
    """The proposed prunes of a run, open or withdrawn. Lines on experts that the run does not have are left out."""
    last = {(d["expert_id"], d["reason"]): d for d in run.run.decisions}
    found, cheap = [], is_cheap(run.worth)
    for (expert_id, reason), decision in last.items():
        match = re.fullmatch(r"L(\d{1,9})_E(\d{1,9})", expert_id)
        if match is None or int(match[1]) not in run.blocks or int(match[2]) >= run.worth.shape[1]:
            continue
        layer, expert = run.blocks.index(int(match[1])), int(match[2])
        worth, error = run.worth[layer], float(run.error[layer, expert])
        less, is_open = int((worth < worth[expert]).sum()), decision["action"] == "open"
        numbers = float(worth[expert]), error, less, len(worth) - 1, bool(cheap[layer, expert])
        found.append(Proposal(run.run.name, expert_id, reason, decision["step"], is_open, *numbers))
    return found
