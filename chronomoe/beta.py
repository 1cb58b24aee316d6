"""Step 3: a signal moves beta.

    beta_coeff <- clamp(beta_coeff + drift, -k_max, k_max)
    drift = eta * (phi_slow - tau)     for experts whose phi was updated in this step, else 0   (signal 'coherence')

Coherent experts are chosen more often. Softmax ignores a shift that is common to all experts of a layer, so only
differences of beta change routing. `center` subtracts the layer's mean drift, and tau then cancels.

Beta drifts at every training step. Only experts that were observed in this step drift: without new tokens phi is
frozen, and its drift would run into the clamp.

A signal is a function in SIGNALS and a choice of ChronoConfig.signal. It must not read a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe.coherence import CoherenceBuffer
from chronomoe.config import ChronoConfig
from chronomoe.router import RouterState
from chronomoe.trace import MoETrace


class Observation(NamedTuple):
    """What a signal may use, per layer and expert."""

    phi_slow: Tensor  # [L, E]
    updated: Tensor  # [L, E] bool: phi was updated in this step
    follows: Tensor | None  # [L, E] int64: the expert whose coherence each expert gets (signal 'shuffled')
    tokens_per_expert: Tensor | None  # [L, E]


def coherence_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """Drift [L, E] towards each expert's own coherence."""
    drift = config.eta * (seen.phi_slow - config.tau) * seen.updated
    if config.center:
        mean = drift.sum(-1, keepdim=True) / seen.updated.sum(-1, keepdim=True).clamp_min(1)
        drift = (drift - mean) * seen.updated
    return drift


def shuffled_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """Drift [L, E] towards the coherence of another expert of the layer: a placebo."""
    if seen.follows is None:
        raise ValueError("signal 'shuffled' needs follows")
    phi, updated = seen.phi_slow.gather(-1, seen.follows), seen.updated.gather(-1, seen.follows)
    return coherence_drift(config, seen._replace(phi_slow=phi, updated=updated))


def load_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """Drift [L, E] of loss-free load balancing (https://arxiv.org/abs/2408.15664, algorithm 1), less its mean.

    An expert with less than its layer's mean load rises by eta, one with more falls by eta.
    """
    load = seen.tokens_per_expert
    if load is None:
        raise ValueError("signal 'load' needs a trace")
    drift = config.eta * torch.sign(load.mean(-1, keepdim=True) - load)
    return drift - drift.mean(-1, keepdim=True)


SIGNALS: dict[str, Callable[[ChronoConfig, Observation], Tensor]] = {
    "coherence": coherence_drift,
    "shuffled": shuffled_drift,
    "load": load_drift,
}


@torch.no_grad()
def update_beta(
    router_state: RouterState,
    coherence: CoherenceBuffer,
    ok: Tensor,
    trace: MoETrace | None = None,
    follows: Tensor | None = None,
    phi_slow: Tensor | None = None,
) -> None:
    """Move beta by one step of the configured signal, in place.

    Args:
        router_state: its beta_coeff [L, E] is updated; its config names the signal.
        coherence: read for phi_slow and for which experts were updated in this step.
        ok: [] bool; where it is False nothing changes.
        trace: this step's trace; needed by signal 'load'.
        follows: [L, E] int64, another expert of the same layer for each expert; needed by signal 'shuffled'.
        phi_slow: [L, E], optional; avoids recomputing it.
    """
    config = router_state.config
    phi_slow = coherence.phi("slow") if phi_slow is None else phi_slow
    tokens_per_expert = None if trace is None else trace.tokens_per_expert
    seen = Observation(phi_slow, coherence.updated(), follows, tokens_per_expert)
    drift = SIGNALS[config.signal](config, seen)
    router_state.beta_coeff.add_(drift * ok).clamp_(-config.k_max, config.k_max)


def derangement(num_layers: int, num_experts: int, seed: int) -> Tensor:
    """Draw for each layer a random permutation of the experts without fixed points: [L, E] int64.

    Each is one cycle through all experts, uniform over such cycles, so every other expert is equally likely.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_layers):
        cycle = torch.randperm(num_experts, generator=generator)
        rows.append(torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1)))
    return torch.stack(rows) if rows else torch.empty(0, num_experts, dtype=torch.int64)
