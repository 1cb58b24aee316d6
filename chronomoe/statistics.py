"""Reduce what the routers did to sums over tokens, for all MoE layers at once.

Layers are stacked, so a forward launches the same number of kernels for any number of layers. Experts are the rows,
[L, E, N]: reductions over experts then read long contiguous runs of memory, which is ten times faster on a CPU than
reading E values at a time.

Shapes: L MoE layers, E experts, N tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from chronomoe.bridge import clean_rank, disagreement_per_token, js_per_token, overlap_per_token
from chronomoe.config import ChronoConfig
from chronomoe.fuse import fused
from chronomoe.router import Routing
from chronomoe.trace import MoETrace

MAX_ENTRIES = 1 << 22  # entries of [L, E, N] processed at a time: bounds memory to 180 MB for K = 2, 430 MB for K = 8


@torch.no_grad()
def collect_trace(
    routings: Sequence[Routing],
    config: ChronoConfig,
    tokens: int | None = None,
    cross_entropy: Tensor | None = None,
    aux_loss: Tensor | None = None,
    router_z_loss: Tensor | None = None,
    kept_per_expert: Sequence[Tensor] = (),
    outputs: Sequence[Tensor] = (),
    logged: bool = True,
    gated_norms: Sequence[Tensor] = (),
) -> MoETrace:
    """Build the trace of one micro-batch.

    Args:
        routings: one per MoE layer, in the model's order; empty for a dense model.
        config: which steps are on.
        tokens: number of tokens; a dense model must give it.
        cross_entropy: [], the loss; where it is not finite, the loop skips the step. None: 0.
        aux_loss, router_z_loss: [], summed over layers, unweighted; only logged. None: the routers'.
        kept_per_expert: one [E] per layer, tokens within capacity; empty: all are.
        outputs: one [2, E, D] per layer, sums over tokens of y_e and of g_e y_e; empty where step 2 is off.
        logged: False leaves out the fields that are only logged.
        gated_norms: one [E] per layer, sums over tokens of |g_e y_e|; only signal 'reap' needs them.

    Raises ValueError if a layer's routing, bias or outputs do not fit the others.
    """
    tokens = len(routings[0].experts) if tokens is None else tokens
    _check_layers(routings, config, tokens, kept_per_expert, outputs)
    cross_entropy = routings[0].gates.new_zeros(()) if cross_entropy is None else cross_entropy
    aux_loss = _total(routing.aux_loss for routing in routings) if aux_loss is None else aux_loss
    router_z_loss = _total(routing.router_z_loss for routing in routings) if router_z_loss is None else router_z_loss
    losses = [loss.detach() for loss in (cross_entropy, aux_loss, router_z_loss)]
    sums: dict[str, Any] = routing_sums(routings, config, logged) if routings else {}
    if routings:
        sums["kept_per_expert"] = torch.stack(list(kept_per_expert)) if kept_per_expert else sums["tokens_per_expert"]
    if outputs:
        sums["output"], sums["gated_output"] = torch.stack(list(outputs), dim=1).unbind(0)
    if gated_norms:
        sums["gated_norm"] = torch.stack(list(gated_norms))
    counts: dict[str, Any] = {"tokens": torch.full_like(losses[0], tokens), "batches": torch.ones_like(losses[0])}
    names = ("cross_entropy", "aux_loss", "router_z_loss")
    return MoETrace(**counts | dict(zip(names, losses)) | sums)


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def _check_layers(
    routings: Sequence[Routing],
    config: ChronoConfig,
    tokens: int,
    kept_per_expert: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    for i, routing in enumerate(routings):
        if len(routing.experts) != tokens:
            raise ValueError(f"layer {i} routed {len(routing.experts)} tokens, not {tokens}")
        if config.router and routing.bias is None:
            raise ValueError(f"layer {i} was routed without its bias: give the router RouterState.layer_biases()[{i}]")
    for name, values, is_needed in (
        ("kept_per_expert", kept_per_expert, False),
        ("outputs", outputs, config.coherence),
    ):
        if len(values) != len(routings) and (values or is_needed):
            raise ValueError(f"{name} has {len(values)} entries for {len(routings)} layers")


@torch.no_grad()
def routing_sums(routings: Sequence[Routing], config: ChronoConfig, logged: bool = True) -> dict[str, Tensor]:
    """Sum each layer's routing over tokens: [L], or [L, E] for tokens_per_expert and prob, by MoETrace's names.

    With step 1 off, tokens_per_expert only.
    """
    sums = {"tokens_per_expert": torch.stack([routing.tokens_per_expert for routing in routings])}
    if not config.router:
        return sums
    at_a_time = max(1, MAX_ENTRIES // routings[0].z_clean.numel())
    groups = [routings[start : start + at_a_time] for start in range(0, len(routings), at_a_time)]
    parts = [_group_sums(group, config, logged) for group in groups]
    return sums | (parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]})


def _group_sums(routings: Sequence[Routing], config: ChronoConfig, logged: bool) -> dict[str, Tensor]:
    """Sums of a group of layers. A layer that exceeds MAX_ENTRIES by itself is processed in slices of tokens."""
    num_tokens, num_experts = routings[0].z_clean.shape
    at_a_time = max(1, MAX_ENTRIES // num_experts)
    if num_tokens <= at_a_time:
        return _slice_sums(routings, config, logged)
    total: dict[str, Tensor] = {}
    for start in range(0, num_tokens, at_a_time):
        tokens = slice(start, start + at_a_time)
        sums = _slice_sums([_select_tokens(routing, tokens) for routing in routings], config, logged)
        total = {name: total[name] + value if total else value for name, value in sums.items()}
    return total


def _select_tokens(routing: Routing, tokens: slice) -> Routing:
    """The per-token fields of a routing for a slice of tokens. Its sums over tokens are left as they are."""
    per_token = ("experts", "gates", "z_clean", "noise_free", "z_biased", "relevance")
    values = {name: getattr(routing, name) for name in per_token}
    return routing._replace(**{name: x[tokens] for name, x in values.items() if x is not None and x.dim() > 0})


def _slice_sums(routings: Sequence[Routing], config: ChronoConfig, logged: bool) -> dict[str, Tensor]:
    z_clean = torch.stack([routing.z_clean for routing in routings])
    noise_free = [routing.noise_free for routing in routings if routing.noise_free is not None]
    biases = [routing.bias.beta_eff for routing in routings if routing.bias]
    beta_eff = torch.stack(biases) if logged or config.bridge else None
    # computed separately from the logged fields, so that their bits do not depend on `logged`
    sums = _state_sums(z_clean, torch.stack(noise_free) if noise_free else None, beta_eff, config)
    if logged and beta_eff is not None:
        experts = torch.stack([routing.experts for routing in routings])
        strengths = [routing.relevance for routing in routings if routing.relevance is not None]
        relevance = torch.stack(strengths).view(len(routings), 1, -1)
        sums |= _logged_sums(z_clean, experts, beta_eff, relevance)
    return sums


@fused
def _state_sums(
    z_clean: Tensor, noise_free: Tensor | None, beta_eff: Tensor | None, config: ChronoConfig
) -> dict[str, Tensor]:
    """The fields that the loop reads, from logits [L, N, E], the same without noise, and beta_eff [L, E]."""
    z = z_clean.transpose(1, 2).contiguous()  # [L, E, N]
    deviation = z if noise_free is None else noise_free.transpose(1, 2).contiguous()
    deviation = deviation - deviation.mean(-2, keepdim=True)
    sums = {"logit_var": deviation.square().sum((-2, -1)) / (z.shape[-2] - 1)}
    del deviation  # free its memory
    if config.bridge and beta_eff is not None:
        clean, biased = z.softmax(-2), (z + beta_eff.unsqueeze(-1)).softmax(-2)
        sums["disagreement"] = disagreement_per_token(clean, biased, config.bridge_signal, dim=-2).sum(-1)
    return sums


@fused
def _logged_sums(z_clean: Tensor, experts: Tensor, beta_eff: Tensor, relevance: Tensor) -> dict[str, Tensor]:
    """The fields that are only logged: logits [L, N, E], choices [L, N, K], beta_eff [L, E], relevance [L, 1, N]."""
    z = z_clean.transpose(1, 2).contiguous()  # [L, E, N]
    clean, biased = z.softmax(-2), (z + relevance * beta_eff.unsqueeze(-1)).softmax(-2)  # as applied
    rank = clean_rank(z_clean, experts, z)
    return {
        "prob": biased.sum(-1),
        "js": js_per_token(clean, biased, dim=-2).sum(-1),
        "overlap": overlap_per_token(clean, biased, dim=-2).sum(-1),
        "flip": (rank[0] > 0).sum(-1, dtype=z.dtype),
        "flip_set": (rank >= len(rank)).sum((0, -1), dtype=z.dtype) / len(rank),
        "relevance": relevance.expand(-1, 1, z.shape[-1]).sum((-2, -1)),
    }
