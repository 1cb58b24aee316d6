"""The loop's metrics by name. A new metric is one line here, if the trace and the state hold what it needs.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chronomoe.coherence import CLOCKS, CoherenceBuffer
from chronomoe.lifecycle import LifecycleCoordinator
from chronomoe.router import RouterState
from chronomoe.signals import SIGNALS, SignalState
from chronomoe.trace import MoETrace

# Means and extremes over layers: name -> (per-layer metric, reduction). Their number does not depend on L and E.
SUMMARY: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "routing/js": ("routing/js", statistics.fmean),
    "routing/js_max": ("routing/js", max),
    "routing/flip": ("routing/flip", statistics.fmean),
    "routing/flip_max": ("routing/flip", max),
    "routing/relevance": ("routing/relevance", statistics.fmean),
    "routing/relevance_min": ("routing/relevance", min),
    "routing/neff_min": ("routing/neff", min),
    "load/cv": ("routing/load_cv", statistics.fmean),
    "load/cv_max": ("routing/load_cv", max),
    "load/dropped": ("routing/dropped", statistics.fmean),
    "beta/spread": ("beta/spread", statistics.fmean),
    "beta/spread_max": ("beta/spread", max),
    "beta/clamped": ("beta/clamped", statistics.fmean),
    "coherence/layer": ("coherence/layer", statistics.fmean),
    "coherence/phi_min": ("coherence/phi_slow_min", min),
    "coherence/phi_max": ("coherence/phi_slow_max", max),
    "coherence/starving": ("coherence/starving", statistics.fmean),
}
EXPERT_VALUES = ("phi_slow", "beta", "load")  # metrics of an expert that sinks show


class Metrics(NamedTuple):
    """Values by name. NaN stands for a value that does not exist."""

    per_layer: dict[str, Tensor]  # 'routing/js' -> [L], logged as 'routing/L0/js'
    per_expert: dict[str, Tensor]  # 'load' -> [L, E], logged as 'expert/L0_E3/load'
    scalars: dict[str, Tensor]  # []


def metrics(
    trace: MoETrace,
    router_state: RouterState,
    coherence: CoherenceBuffer,
    lifecycle: LifecycleCoordinator,
    signals: SignalState,
    strength: Tensor | None = None,
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
        if SIGNALS[config.signal].score is not None:
            found.per_expert["score"] = signals.score().where(signals.score_count > 0, torch.nan)
    if config.beta and strength is not None:
        found.scalars["beta/strength"] = strength
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


def place_of(name: str) -> tuple[str, int, int | None] | None:
    """The metric, block and expert of a logged name: ('routing/js', 0, None) for 'routing/L0/js', ('load', 0, 3) for
    'expert/L0_E3/load'. None if the metric is not of a layer or an expert.
    """
    found = re.fullmatch(r"(\w+)/L(\d+)(?:_E(\d+))?/(\w+)", name)
    if found is None:
        return None
    group, block, expert, metric = found.groups()
    return (f"{group}/{metric}", int(block), None) if expert is None else (metric, int(block), int(expert))


def summary(values: Mapping[str, float | None]) -> dict[str, float]:
    """The metrics of SUMMARY, from a logged step's metrics by name. Layers without a value are left out."""
    layers: dict[str, list[float]] = {}
    for name, value in values.items():
        place = place_of(name)
        if place is not None and place[2] is None and value is not None:
            layers.setdefault(place[0], []).append(value)
    return {name: reduce(layers[metric]) for name, (metric, reduce) in SUMMARY.items() if metric in layers}


def by_expert(values: Mapping[str, float | None], metric: str) -> dict[tuple[int, int], float | None]:
    """A metric of the experts, as 'load', by (block, expert), from a logged step's metrics by name."""
    places = ((place_of(name), value) for name, value in values.items() if name.endswith(f"/{metric}"))
    return {(p[1], p[2]): value for p, value in places if p is not None and p[0] == metric and p[2] is not None}
