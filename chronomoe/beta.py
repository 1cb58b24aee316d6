"""Step 3: coherence moves beta.

    beta_coeff += eta * (phi_slow - tau)     for experts whose phi moved in this step, then clamped to -k_max..k_max

The plan moves beta every 100 steps by what was observed since about the last time. Here beta drifts every step, so the
evidence must be of that step: without new tokens phi is frozen, and its drift would go on to the clamp.

A promotion prior: coherent experts are chosen more often. Softmax ignores a shift common to a layer's experts, so only
the differences route; `center` subtracts the layer's mean drift, and then tau cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chronomoe.coherence import CoherenceBuffer
from chronomoe.router import RouterState


@torch.no_grad()
def update_beta(
    router_state: RouterState,
    coherence: CoherenceBuffer,
    ok: Tensor,
    follows: Tensor | None = None,
    phi_slow: Tensor | None = None,
) -> None:
    """One step of beta from phi_slow for the experts updated in this step; where `ok` [] bool is False nothing changes.

    `follows` [L, E] int64 gives each expert the coherence of another one of its layer (signal 'shuffled').
    phi_slow [L, E] spares taking it from `coherence` again.
    """
    config = router_state.config
    phi, updated = coherence.phi("slow") if phi_slow is None else phi_slow, coherence.updated()
    if follows is not None:
        phi, updated = phi.gather(-1, follows), updated.gather(-1, follows)
    drift = config.eta * (phi - config.tau) * updated
    if config.center:
        mean = drift.sum(-1, keepdim=True) / updated.sum(-1, keepdim=True).clamp_min(1)
        drift = (drift - mean) * updated
    _apply(router_state, drift, ok)


@torch.no_grad()
def update_beta_from_load(router_state: RouterState, chosen: Tensor, ok: Tensor) -> None:
    """Loss-free load balancing (https://arxiv.org/abs/2408.15664, algorithm 1) from chosen slots [L, E], recentred.

    An expert with less than its layer's mean load rises by eta, one with more falls by eta.
    """
    drift = router_state.config.eta * torch.sign(chosen.mean(-1, keepdim=True) - chosen)
    _apply(router_state, drift - drift.mean(-1, keepdim=True), ok)


def _apply(router_state: RouterState, drift: Tensor, ok: Tensor) -> None:
    k_max = router_state.config.k_max
    router_state.beta_coeff.add_(drift * ok).clamp_(-k_max, k_max)


def derangement(num_layers: int, num_experts: int, seed: int) -> Tensor:
    """For each layer a random permutation of the experts without fixed points, [L, E] int64, from `seed`.

    A random cycle through all experts: uniform over cyclic permutations, so every other expert is equally likely.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_layers):
        cycle = torch.randperm(num_experts, generator=generator)
        rows.append(torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1)))
    return torch.stack(rows) if rows else torch.empty(0, num_experts, dtype=torch.int64)
