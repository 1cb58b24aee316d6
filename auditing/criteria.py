"""Criteria that rank the experts of a layer. The lowest is pruned first.

A new criterion is a function and a line in CRITERIA. Each returns scores [L, E] from what was observed on validation
text, and None if the run does not have what it needs. Gates are the applied ones, including beta if `gates` is
'biased'. A mean over no tokens is 0.

Shapes: L MoE layers, E experts. Sums are over the tokens that an expert processed: g its gate, y its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe import ChronoLoop
from chronomoe.coherence import CLOCKS
from model import GPT


@dataclass(frozen=True)
class Observed:
    """What the criteria use, [L, E] float64."""

    tokens: Tensor  # sums over the validation batches, see LayerSums
    gate: Tensor
    norm: Tensor
    gated_norm: Tensor
    first_order: Tensor
    phi: Tensor  # means over the validation batches in which the expert had tokens
    phi_leave_one_out: Tensor
    trained: dict[str, Tensor]  # phi of training by clock; empty if step 2 was off
    weights_abs: Tensor  # mean |w| over the expert's weight matrices
    weights_rms: Tensor  # root mean square of the same
    seed: int  # of the run


def phi_fast(o: Observed) -> Tensor | None:
    """phi of the fast clock at the end of training (the plan, step 2)."""
    return o.trained.get("fast")


def phi_mid(o: Observed) -> Tensor | None:
    """phi of the middle clock at the end of training (the plan, step 2)."""
    return o.trained.get("mid")


def phi_slow(o: Observed) -> Tensor | None:
    """phi of the slow clock at the end of training, which the plan prunes by (step 5)."""
    return o.trained.get("slow")


def phi_val(o: Observed) -> Tensor:
    """cos(sum y, sum of the mixture), mean over validation batches."""
    return o.phi


def phi_leave_one_out(o: Observed) -> Tensor:
    """cos(sum y, sum of the mixture without g y), mean over validation batches."""
    return o.phi_leave_one_out


def load(o: Observed) -> Tensor:
    """Number of tokens. https://arxiv.org/abs/2404.05089 calls it hard frequency."""
    return o.tokens


def mean_gate(o: Observed) -> Tensor:
    """sum g / number of tokens."""
    return o.gate / o.tokens.clamp_min(1)


def ean(o: Observed) -> Tensor:
    """Expert activation norm: sum |y|. As pruning_metrics.py of https://github.com/CerebrasResearch/reap."""
    return o.norm


def reap(o: Observed) -> Tensor:
    """sum g |y| / number of tokens. https://arxiv.org/abs/2510.13999."""
    return o.gated_norm / o.tokens.clamp_min(1)


def man(o: Observed) -> Tensor:
    """Mean activation norm: sum |y| / number of tokens. https://arxiv.org/abs/2606.15716."""
    return o.norm / o.tokens.clamp_min(1)


def aimer(o: Observed) -> Tensor:
    """-mean |w| / rms(w) of the expert's weight matrices: the highest ratio is pruned. https://arxiv.org/abs/2603.18492."""
    return -o.weights_abs / o.weights_rms.clamp_min(torch.finfo(torch.float64).tiny)


def first_order(o: Observed) -> Tensor:
    """sum |g dL/dg|. https://arxiv.org/abs/1905.10650 for heads, https://arxiv.org/abs/2404.05089 for experts."""
    return o.first_order


def random(o: Observed) -> Tensor:
    """Random numbers from the run's seed: a check of the method."""
    return torch.rand(o.tokens.shape, generator=torch.Generator().manual_seed(o.seed), dtype=torch.float64)


CRITERIA: dict[str, Callable[[Observed], Tensor | None]] = {
    "phi_slow": phi_slow,
    "phi_mid": phi_mid,
    "phi_fast": phi_fast,
    "phi_val": phi_val,
    "phi_leave_one_out": phi_leave_one_out,
    "load": load,
    "mean_gate": mean_gate,
    "ean": ean,
    "reap": reap,
    "man": man,
    "aimer": aimer,
    "first_order": first_order,
    "random": random,
}
PRIMARY = "phi_slow"


def scores(o: Observed) -> dict[str, Tensor]:
    """The scores [L, E] of every criterion that the run has data for."""
    found = {name: criterion(o) for name, criterion in CRITERIA.items()}
    return {name: score for name, score in found.items() if score is not None}


@torch.no_grad()
def trained_phi(model: GPT, loop: ChronoLoop) -> dict[str, Tensor]:
    """phi at the end of training by clock, [L, E]; empty if step 2 was off."""
    if not model.config.chrono.coherence:
        return {}
    return {clock: loop.coherence.phi(clock).cpu().double() for clock in CLOCKS}


@torch.no_grad()
def weight_statistics(layers: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """(mean |w|, root mean square of w) over each expert's weight matrices, [L, E].

    layers: the matrices of each layer, of which the first dimension is the expert.
    """
    means, roots = [], []
    for matrices in layers:
        w = torch.cat([matrix.flatten(1).cpu().double() for matrix in matrices], dim=1)
        means.append(w.abs().mean(1))
        roots.append(w.square().mean(1).sqrt())
    return torch.stack(means), torch.stack(roots)
