"""What routing did, in sums over tokens, for all MoE layers at once.

Layers are stacked, so that a forward costs the same handful of kernels however many there are, and experts are rows,
[L, E, N]: what is summed over a token's experts is then read in long, contiguous runs, which a CPU does ten times
faster than runs of E.

Shapes: L MoE layers, E experts, N tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chronomoe.bridge import clean_rank, disagreement_per_token, js_per_token, overlap_per_token
from chronomoe.config import ChronoConfig
from chronomoe.router import Routing
from chronomoe.trace import MoETrace

LARGEST = 1 << 22  # entries of [L, E, N] taken at a time: bounds memory to 180 MB for K = 2, 430 MB for K = 8


@torch.no_grad()
def collect_trace(
    routings: Sequence[Routing],
    config: ChronoConfig,
    tokens: int,
    cross_entropy: Tensor,
    aux_loss: Tensor,
    router_z_loss: Tensor,
    kept: Sequence[Tensor] = (),
    outputs: Sequence[Tensor] = (),
    logged: bool = True,
) -> MoETrace:
    """The trace of one micro-batch of `tokens` tokens, from what each layer did in the model's order.

    routings: what the routers returned; none for a dense model. The losses are [], the auxiliary ones summed over
    layers. kept: slots within capacity, [E] a layer; none given, all were. outputs: sums of y_e and of g_e y_e,
    [2, E, D] a layer, where step 2 is on. logged=False leaves out what only logs read.
    """
    losses = [loss.detach() for loss in (cross_entropy, aux_loss, router_z_loss)]
    sums = routing_sums(routings, config, logged) if routings else {}
    if routings:
        sums["kept"] = torch.stack(list(kept)) if kept else sums["chosen"]
    if outputs:
        sums["output"], sums["gated_output"] = torch.stack(list(outputs), dim=1).unbind(0)
    return MoETrace(torch.full_like(losses[0], tokens), torch.ones_like(losses[0]), *losses, **sums)


@torch.no_grad()
def routing_sums(routings: Sequence[Routing], config: ChronoConfig, logged: bool = True) -> dict[str, Tensor]:
    """Sums over tokens of each layer's routing, by MoETrace's names: [L], or [L, E] for chosen and prob.

    Only `chosen` with step 1 off. They are read from what the routers returned, and change nothing.
    """
    sums = {"chosen": torch.stack([routing.chosen for routing in routings])}
    if not config.router:
        return sums
    at_a_time = max(1, LARGEST // routings[0].z_clean.numel())
    groups = [routings[start : start + at_a_time] for start in range(0, len(routings), at_a_time)]
    parts = [_sums_of_group(group, config, logged) for group in groups]
    return sums | (parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]})


def _sums_of_group(routings: Sequence[Routing], config: ChronoConfig, logged: bool) -> dict[str, Tensor]:
    """The sums of some layers, tokens in slices where one layer alone is over LARGEST."""
    num_tokens, num_experts = routings[0].z_clean.shape
    at_a_time = max(1, LARGEST // num_experts)
    if num_tokens <= at_a_time:
        return _sums_of_bias(routings, config, logged)
    total: dict[str, Tensor] = {}
    for start in range(0, num_tokens, at_a_time):
        tokens = slice(start, start + at_a_time)
        sums = _sums_of_bias([_at(routing, tokens) for routing in routings], config, logged)
        total = {name: total[name] + value if total else value for name, value in sums.items()}
    return total


def _at(routing: Routing, tokens: slice) -> Routing:
    """What a routing says of each of these tokens; its sums over tokens stay those of all."""
    per_token = ("experts", "gates", "z_clean", "noise_free", "z_biased", "relevance")
    values = {name: getattr(routing, name) for name in per_token}
    return routing._replace(**{name: x[tokens] for name, x in values.items() if x is not None and x.dim() > 0})


def _sums_of_bias(routings: Sequence[Routing], config: ChronoConfig, logged: bool) -> dict[str, Tensor]:
    z_clean = torch.stack([routing.z_clean for routing in routings])  # [L, N, E]
    z = z_clean.transpose(1, 2).contiguous()  # [L, E, N]
    noise_free = z
    if routings[0].noise_free is not None:
        noise_free = torch.stack([routing.noise_free for routing in routings]).transpose(1, 2).contiguous()
    sums = {"logit_var": (noise_free - noise_free.mean(-2, keepdim=True)).square().sum((-2, -1)) / (z.shape[-2] - 1)}
    del noise_free  # frees its memory
    if not (logged or config.bridge):
        return sums

    full = torch.stack([routing.bias.beta_eff for routing in routings]).unsqueeze(-1)  # [L, E, 1]
    clean = z.softmax(-2)
    if config.bridge:
        # by itself, so that its bits are the same whether or not the step logs
        biased = (z + full).softmax(-2)
        sums["disagreement"] = disagreement_per_token(clean, biased, config.bridge_signal, dim=-2).sum(-1)
    if logged:
        experts = torch.stack([routing.experts for routing in routings])  # [L, N, K]
        relevance = torch.stack([routing.relevance for routing in routings]).view(len(routings), 1, -1)
        biased = (z + relevance * full).softmax(-2)  # as it was used
        rank = clean_rank(z_clean, experts, z)
        sums |= {
            "prob": biased.sum(-1),
            "js": js_per_token(clean, biased, dim=-2).sum(-1),
            "overlap": overlap_per_token(clean, biased, dim=-2).sum(-1),
            "flip": (rank[0] > 0).sum(-1, dtype=z.dtype),
            "flip_set": (rank >= len(rank)).sum((0, -1), dtype=z.dtype) / len(rank),
            "relevance": relevance.expand(-1, 1, z.shape[-1]).sum((-2, -1)),
        }
    return sums
