"""An MoE layer with gated experts through grouped_mm, in the manner of torchtitan, for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gated_width(D: int) -> int:
    """Width of gated experts with as many multiplications as an MLP of width 4 D: they have three products, not two."""
    return round(D / 3) * 8


class GroupedLayer(nn.Module):
    """Router with softmax before top-k, SwiGLU experts, and outputs that are added to their tokens with atomics.

    Shapes: N tokens, D model width, E experts, K choices per token. It has no capacity and no statistics.

    Args:
        D, E, K: sizes.
        generator: of the weights.
    """

    def __init__(self, D: int, E: int, K: int, generator: torch.Generator):
        super().__init__()
        width = gated_width(D)
        self.top_k = K
        self.router = nn.Linear(D, E, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(E, D, width)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(E, width, D))
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture [1, N, D] of tokens x [1, N, D]."""
        tokens = x.flatten(0, 1)
        scores, experts = self.router(tokens).float().softmax(-1).topk(self.top_k)
        E = len(self.gate)
        ends = torch.histc(experts.flatten().float(), E, 0, E).cumsum(0, dtype=torch.int32)
        order = experts.flatten().argsort(stable=True)
        source = order // self.top_k  # token of each sorted row
        # autocast does not cover grouped_mm
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        gate, up, down = (weight.to(dtype) for weight in (self.gate, self.up, self.down))
        rows = tokens[source].to(dtype)
        hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
        weighted = F.grouped_mm(hidden, down, offs=ends).float() * scores.flatten()[order, None]
        out = torch.zeros_like(tokens).scatter_add(0, source[:, None].expand_as(weighted), weighted.to(tokens.dtype))
        return out.view_as(x)
