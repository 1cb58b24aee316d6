"""nanoMoE's dispatch with one-hot tensors, as a reference."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, LayerTrace, MOELayer

CAPACITY = 1.25  # nanoMoE's default


def capacity_of(layer: MOELayer, num_tokens: int) -> int:
    slots = int(layer.config.top_k * CAPACITY * num_tokens / layer.config.n_exp)
    return slots + slots % 2


def bytes_of_largest(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Size of the largest tensor, [K, N, E, capacity] in float32."""
    return int(4 * top_k * num_tokens * top_k * CAPACITY * num_tokens)


def forward(layer: MOELayer, x: Tensor, bias, return_trace: bool) -> tuple[Tensor, LayerTrace]:
    """Replacement for MOELayer.forward, without statistics."""
    tokens = x.reshape(-1, x.shape[-1])
    routing = layer.router(tokens, bias)
    c_fc, c_proj = layer.experts.c_fc, layer.experts.c_proj
    out = one_hot_moe(tokens, routing.experts, routing.gates, c_fc, c_proj, capacity_of(layer, len(tokens)))
    return out.view_as(x), LayerTrace(routing, None, None)


def use_one_hot(model: GPT) -> GPT:
    """Make all MoE layers of the model dispatch with one-hot tensors."""
    for module in model.modules():
        if isinstance(module, MOELayer):
            module.forward = partial(forward, module)
    return model


def one_hot_moe(x: Tensor, experts: Tensor, gates: Tensor, c_fc: Tensor, c_proj: Tensor, capacity: int) -> Tensor:
    """The mixture [N, D] of tokens x [N, D], with [N, E, capacity] one-hot tensors as in nanoMoE, without loops.

    experts, gates: [N, K]. c_fc: [E, D, 4 D]. c_proj: [E, 4 D, D].
    """
    chosen = F.one_hot(experts.t(), len(c_fc))  # [K, N, E]
    K, N, E = chosen.shape
    rank = (chosen.reshape(K * N, E).cumsum(0) - 1).view(K, N, E)
    chosen = chosen * (rank < capacity)
    place = F.one_hot((rank * chosen).sum(-1), capacity)  # [K, N, C]
    weight = chosen * gates.t().unsqueeze(-1)
    combine = (weight.unsqueeze(3) * place.unsqueeze(2)).sum(0)  # [N, E, C]
    batches = combine.bool().permute(1, 2, 0).to(x.dtype) @ x
    out = torch.bmm(F.gelu(torch.bmm(batches, c_fc)), c_proj)
    return combine.view(N, -1) @ out.view(-1, x.shape[-1])
