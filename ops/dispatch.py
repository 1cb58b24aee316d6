"""Send tokens to experts and back, by one stable sort.

A slot is a (token, choice) pair. Slots are in choice-major order: slot k * N + n is the k-th choice of token n. A
stable sort of the slots by expert puts the rows of each expert next to each other, first choices before
second choices, the order in which nanoMoE fills an expert's capacity. Forward and backward only gather, in both
directions: there are no atomics, so results are deterministic, and no [N, E, capacity] tensor.

Slots over capacity are computed and weighted by zero: a capacity changes what is learnt, not the cost of a step.

Shapes: N tokens, K choices per token, E experts, D model width, S = K * N slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """The permutation of the slots. Row r of a sorted tensor [S, ...] belongs to slot order[r]."""

    experts: Tensor  # [S] int16 or int64, the expert of each sorted row
    order: Tensor  # [S] int64, sorted row -> slot
    tokens: Tensor  # [S] int64, sorted row -> token
    inverse: Tensor  # [S] int64, slot -> sorted row
    offsets: Tensor  # [E] int32, end of each expert's rows
    kept: Tensor | None  # [S] bool per sorted row: within the expert's capacity. None: all are


def plan_dispatch(experts: Tensor, num_experts: int, capacity: int | None = None) -> Dispatch:
    """Sort the slots of the choices `experts` [N, K] int64. Each expert keeps its first `capacity` slots; None: all."""
    # a GPU sorts by radix, 8 bits at a time
    dtype = torch.int16 if num_experts <= 1 << 15 else torch.int64
    slots = experts.t().to(dtype).reshape(-1)
    sorted_experts, order = slots.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    all_experts = torch.arange(num_experts, device=order.device, dtype=dtype)
    offsets = torch.searchsorted(sorted_experts, all_experts, right=True, out_int32=True)
    kept = None
    if capacity is not None:
        starts = torch.searchsorted(sorted_experts, all_experts)
        kept = torch.arange(len(order), device=order.device) - starts.index_select(0, sorted_experts.long()) < capacity
    return Dispatch(sorted_experts, order, order % len(experts), inverse, offsets, kept)


class _ToExperts(torch.autograd.Function):
    """x [N, D] -> rows sorted by expert [S, D]. The backward of plain indexing would use atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_tokens, ctx.dtype = len(x), x.dtype
        return x.to(dtype).index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        by_choice = grad.index_select(0, inverse).view(-1, ctx.num_tokens, grad.shape[-1])
        return by_choice.sum(0, dtype=ctx.dtype), None, None, None


class _FromExperts(torch.autograd.Function):
    """Rows [S, D] and gates [N, K] -> sum over k of gate * row, [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, order: Tensor, tokens: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, order, tokens, inverse)
        num_tokens, top_k = gates.shape
        by_choice = rows.index_select(0, inverse).view(top_k, num_tokens, -1)
        out = by_choice[0] * gates[:, :1]
        for k in range(1, top_k):
            out = torch.addcmul(out, by_choice[k], gates[:, k : k + 1])
        # torch.compile of torch 2.11 loses the gradient of a Function that returns `to` of the same dtype
        return out if out.dtype == rows.dtype else out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gates, order, tokens, inverse = ctx.saved_tensors
        num_tokens, top_k = gates.shape
        grad_rows = grad.index_select(0, tokens)
        # in the dtype of the gates: the product of two bfloat16 numbers is exact in float32
        grad_gates = (grad_rows * rows.to(gates.dtype)).sum(-1).index_select(0, inverse).view(top_k, num_tokens).t()
        row_gates = gates.t().reshape(-1).index_select(0, order)
        row_gates = row_gates.to(grad.dtype).unsqueeze(-1)
        # in place, to save a tensor of all rows; a second derivative needs grad_rows unchanged
        grad_rows = grad_rows * row_gates if torch.is_grad_enabled() else grad_rows.mul_(row_gates)
        return grad_rows, grad_gates, None, None, None


def to_experts(x: Tensor, plan: Dispatch, dtype: torch.dtype | None = None) -> Tensor:
    """Copy the tokens x [N, D] into rows sorted by expert, [S, D], in `dtype`; None: that of x. Differentiable in x."""
    return _ToExperts.apply(x, plan.tokens, plan.inverse, dtype or x.dtype)


def from_experts(rows: Tensor, gates: Tensor, plan: Dispatch) -> Tensor:
    """Mix the expert outputs rows [S, D] by gates [N, K]: [N, D]. Differentiable in both."""
    return _FromExperts.apply(rows, gates, plan.order, plan.tokens, plan.inverse)


def kept_gates(gates: Tensor, plan: Dispatch) -> Tensor:
    """gates [N, K] with zeros for slots over capacity."""
    if plan.kept is None:
        return gates
    kept = plan.kept.index_select(0, plan.inverse).view(gates.shape[1], -1).t()
    return gates * kept


def rows_per_expert(plan: Dispatch) -> Tensor:
    """Number of rows per expert, over capacity or not: [E] int32."""
    return plan.offsets.diff(prepend=plan.offsets.new_zeros(1))


def row_weights(gates: Tensor, plan: Dispatch) -> Tensor:
    """Weights [2, S] of the sorted rows in their expert's sums of y and of g * y, from the kept gates [N, K]."""
    used = gates.t().reshape(-1).index_select(0, plan.order)
    return torch.stack([torch.ones_like(used) if plan.kept is None else plan.kept.to(used.dtype), used])


def sum_per_expert(values: Tensor, plan: Dispatch) -> Tensor:
    """Sums [E] of values [S] over the sorted rows of each expert."""
    all_experts = torch.arange(len(plan.offsets), device=values.device, dtype=plan.experts.dtype)
    # index_add would use atomics, and autocast would narrow a matmul
    return (values.unsqueeze(-1) * (plan.experts.unsqueeze(-1) == all_experts)).sum(0)
