"""How much the loss rises when the experts that a criterion ranks lowest are masked together.

Compared with the best choice and with random choices. Where a layer has at most EXHAUSTIVE subsets of a size, all are
measured: the best choice is exact and the random distribution complete. Otherwise, the best choice is greedy (one
expert more at a time) or that of a criterion, whichever is better, and DRAWN random subsets are measured. In every
layer at once, the best choice is the union of the layers' best or the best of a criterion: an approximation.

Each subset costs one forward from its layer on. With up to 128 experts that is at most 3 * EXHAUSTIVE forwards per
layer and batch; with more, the greedy search alone takes four times their number.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from auditing.cache import Cache
from auditing.measure import Measured, check_signal
from trainer import setup
from trainer.interventions import Batch, Masks, mask_key

SIZES = (1, 2, 4)
EXHAUSTIVE = 300
DRAWN = 32
EVERY = "every layer"


@dataclass(frozen=True)
class MaskedSets:
    """Rises of the loss, nats per token, when `size` experts are masked in one layer or in each."""

    place: str  # "L0", or EVERY
    size: int
    criteria: dict[str, float]  # by the criterion that chose the experts
    best: float
    is_exact: bool  # whether `best` is the best of all subsets
    random: list[float]  # of all subsets of a layer, or of a sample

    @property
    def beaten(self) -> dict[str, float]:
        """By criterion, the share of random choices whose rise is larger, where ties count half."""
        drawn = np.array(self.random)
        return {
            name: float(((drawn > rise).mean() + (drawn >= rise).mean()) / 2) for name, rise in self.criteria.items()
        }


class Rises:
    """Rises of the loss with masked experts, on the first `batches` validation batches; kept in the cache."""

    def __init__(self, trained: setup.Run, cache: Cache, batches: int):
        self.trained, self.cache = trained, cache
        self.known: dict[str, list[float]] = {line["masks"]: line["losses"] for line in cache.lines if "masks" in line}
        self.count = batches
        self.batches: list[Batch] = []
        self.base: list[float] = []
        self.bar = tqdm(desc="subsets", unit=" subsets", leave=False, disable=None)

    def __call__(self, masks: Masks) -> float:
        """Mean rise over the batches. Raises Stopped after a signal."""
        check_signal(self.trained)
        if not self.batches:
            loader = self.trained.batches
            self.batches = [Batch(self.trained.model, *loader.validation(i), criteria=False) for i in range(self.count)]
            self.base = [batch.loss for batch in self.batches]
        key = mask_key(masks)
        losses = self.known.get(key, [])
        if len(losses) < self.count:
            losses = losses + [batch.loss_masked(masks) for batch in self.batches[len(losses) :]]
            self.cache.append({"masks": key, "losses": losses})
            self.known[key] = losses
        self.bar.update()
        return float(np.mean(losses[: self.count]) - np.mean(self.base))


def lowest(score: np.ndarray, size: int) -> tuple[int, ...]:
    """The `size` experts of the lowest score [E]; of equal scores the first."""
    return tuple(sorted(np.argsort(score, kind="stable")[:size].tolist()))


def masked_sets(measured: Measured, rises: Rises) -> list[MaskedSets]:
    """The rise by every criterion in each layer and in every layer at once, for each of SIZES that leaves top_k."""
    num_experts = measured.worth.shape[1]
    sizes = [size for size in SIZES if num_experts - size >= measured.top_k]
    found: list[MaskedSets] = []
    best_of: dict[tuple[int, int], tuple[int, ...]] = {}
    for layer, block in enumerate(measured.blocks):
        for size in sizes:
            chosen = {name: lowest(score[layer], size) for name, score in measured.scores.items()}
            is_exact = math.comb(num_experts, size) <= EXHAUSTIVE
            if is_exact:
                drawn = [tuple(s) for s in itertools.combinations(range(num_experts), size)]
                tried = set(drawn)
            else:
                drawn = _drawn(num_experts, size, (measured.run.seed, layer, size))
                tried = {*drawn, *chosen.values(), _greedy(block, size, num_experts, rises)}
            of = {subset: rises({block: subset}) for subset in sorted(tried)}
            best_of[block, size] = min(of, key=lambda subset: of[subset])
            criteria = {name: of[subset] for name, subset in chosen.items()}
            found.append(
                MaskedSets(f"L{block}", size, criteria, min(of.values()), is_exact, [of[subset] for subset in drawn])
            )
    if len(measured.blocks) > 1:
        for size in sizes:
            found.append(_in_every_layer(measured, size, rises, best_of))
    rises.bar.close()
    return found


def _in_every_layer(
    measured: Measured, size: int, rises: Rises, best_of: dict[tuple[int, int], tuple[int, ...]]
) -> MaskedSets:
    blocks, num_experts = measured.blocks, measured.worth.shape[1]
    criteria = {
        name: rises({block: lowest(score[layer], size) for layer, block in enumerate(blocks)})
        for name, score in measured.scores.items()
    }
    of_layer = [_drawn(num_experts, size, (measured.run.seed, layer, size, 1)) for layer in range(len(blocks))]
    random = [rises(dict(zip(blocks, subsets))) for subsets in zip(*of_layer)]
    union = rises({block: best_of[block, size] for block in blocks})
    return MaskedSets(EVERY, size, criteria, min(union, *criteria.values(), *random), False, random)


def _drawn(num_experts: int, size: int, seed: tuple[int, ...]) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(sorted(rng.permutation(num_experts)[:size].tolist())) for _ in range(DRAWN)]


def _greedy(block: int, size: int, num_experts: int, rises: Rises) -> tuple[int, ...]:
    """Add the expert with the least rise until there are `size`."""
    chosen: tuple[int, ...] = ()
    for _ in range(size):
        options = [tuple(sorted((*chosen, e))) for e in range(num_experts) if e not in chosen]
        chosen = min(options, key=lambda subset: rises({block: subset}))
    return chosen
