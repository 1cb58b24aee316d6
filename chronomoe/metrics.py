"""The loop's metrics by name. A new metric is one line here, if the trace and the state hold what it needs.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe.coherence import CLOCKS, CoherenceBuffer
from chronomoe.lifecycle import LifecycleCoordinator
from chronomoe.router import RouterState
from chronomoe.trace import MoETrace


class Metrics(NamedTuple):
    """Values by name. NaN stands for a value that does not exist."""

    per_layer: dict[str, Tensor]  # 'routing/js' -> [L], logged as 'routing/L0/js'
    per_expert: dict[str, Tensor]  # 'load' -> [L, E], logged as 'expert/L0_E3/load'
    scalars: dict[str, Tensor]  # []


def metrics(
    trace: MoETrace, router_state: RouterState, coherence: CoherenceBuffer, lifecycle: LifecycleCoordinator
) -> Metrics:
    """The metrics of one step, on the device, from a trace with its logged fields."""
    config = router_state.config
    tokens_per_expert, kept_per_expert = trace.tokens_per_expert, trace.kept_per_expert
    if tokens_per_expert is None or kept_per_expert is None:
        return Metrics({}, {}, {})
    load = tokens_per_expert / tokens_per_expert.sum(-1, keepdim=True)
    found = Metrics(
        {
            "routing/load_cv": load.std(-1, correction=0) / load.mean(-1),
            "routing/dropped": 1 - kept_per_expert.sum(-1) / tokens_per_expert.sum(-1),
        },
        {"load": load},
        {},
    )
    if config.router and trace.prob is not None:
        mean_prob = trace.prob / trace.tokens
        beta = router_state.beta_coeff
        found.per_layer.update(
            {
                f"routing/{name}": getattr(trace, name) / trace.tokens
                for name in ("js", "flip", "flip_set", "overlap", "relevance")
            }
        )
        found.per_layer.update(
            {
                "routing/logit_std": router_state.logit_std,
                "routing/neff": torch.special.entr(mean_prob).sum(-1).exp(),
                "routing/saturation": mean_prob.amax(-1),
                "beta/mean": beta.mean(-1),
                "beta/std": beta.std(-1, correction=0),
                "beta/min": beta.amin(-1),
                "beta/max": beta.amax(-1),
                "beta/spread": beta.amax(-1) - beta.amin(-1),
                "beta/clamped": (beta.abs() >= config.k_max).to(beta.dtype).mean(-1),
            }
        )
        found.per_expert["beta"] = beta
    if config.coherence:
        seen = coherence.ever_observed()
        any_seen = seen.any(-1)
        slow = coherence.phi("slow")
        found.per_layer.update(
            {
                "coherence/layer": coherence.layer_phi().where(any_seen, torch.nan),
                "coherence/phi_slow_min": slow.masked_fill(~seen, torch.inf).amin(-1).where(any_seen, torch.nan),
                "coherence/phi_slow_max": slow.masked_fill(~seen, -torch.inf).amax(-1).where(any_seen, torch.nan),
                "coherence/starving": coherence.starving(),
            }
        )
        found.per_expert.update({f"phi_{clock}": coherence.phi(clock).where(seen, torch.nan) for clock in CLOCKS})
    if config.lifecycle:
        found.scalars["lifecycle/candidates"] = lifecycle.candidates()
    return found


def layer_metric(name: str, block: int) -> str:
    """The logged name of a per-layer metric: 'routing/js' of transformer block 0 is 'routing/L0/js'."""
    group, metric = name.split("/")
    return f"{group}/L{block}/{metric}"


def expert_id(block: int, expert: int) -> str:
    """The name of an expert: 'L0_E3' is expert 3 of the MoE layer in transformer block 0."""
    return f"L{block}_E{expert}"
