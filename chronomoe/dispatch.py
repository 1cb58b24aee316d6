"""Tokens to experts and back, by one stable sort; no [N, E, capacity] tensor, no atomics.

Slots are (token, choice) pairs in choice-major order: slot k * N + n is token n's k-th choice. A stable sort of the
slots by expert gives each expert a contiguous run in which first choices come before second ones, which is the order in
which nanoMoE fills an expert's capacity. Both directions only gather, forward and backward, so results repeat bit for
bit. Slots over capacity are computed and weighed by zero: a capacity changes what is learnt, not what a step costs.

Shapes: N tokens, K choices a token, E experts, D model width, S = K * N slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Where each slot went. Row r of a sorted tensor [S, ...] belongs to slot order[r]."""

    experts: Tensor  # [S] int64, the expert of each sorted row
    order: Tensor  # [S] int64, sorted row -> slot
    inverse: Tensor  # [S] int64, slot -> sorted row
    ends: Tensor  # [E] int32, end of each expert's run of rows
    kept: Tensor | None  # [S] bool by sorted row: within the expert's capacity; None: all are


def plan_dispatch(experts: Tensor, num_experts: int, capacity: int | None = None) -> Dispatch:
    """Sort the slots of the choices `experts` [N, K] int64; an expert keeps its first `capacity` slots, None: all."""
    slots = experts.t().reshape(-1)
    sorted_experts, order = slots.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    all_experts = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(sorted_experts, all_experts, right=True, out_int32=True)
    kept = None
    if capacity is not None:
        starts = torch.searchsorted(sorted_experts, all_experts)
        kept = torch.arange(len(order), device=order.device) - starts.index_select(0, sorted_experts) < capacity
    return Dispatch(sorted_experts, order, inverse, ends, kept)


class _ToExperts(torch.autograd.Function):
    """x [N, D] -> rows sorted by expert [S, D]; the backward of a plain index would scatter with atomics."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        ctx.num_tokens = len(x)
        return x.index_select(0, order % len(x))

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        by_choice = grad.index_select(0, inverse).view(-1, ctx.num_tokens, grad.shape[-1])
        return by_choice.sum(0), None, None


class _FromExperts(torch.autograd.Function):
    """Rows [S, D] and their gates [N, K] -> sum_k gate * row, [N, D]."""

    @staticmethod
    def forward(ctx, rows, gates, order, inverse):
        ctx.save_for_backward(rows, gates, order, inverse)
        num_tokens, top_k = gates.shape
        by_choice = rows.index_select(0, inverse).view(top_k, num_tokens, -1)
        out = by_choice[0] * gates[:, :1]
        for k in range(1, top_k):
            out = torch.addcmul(out, by_choice[k], gates[:, k : k + 1])
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        rows, gates, order, inverse = ctx.saved_tensors
        num_tokens, top_k = gates.shape
        grad_rows = grad.index_select(0, order % num_tokens)
        # in the gates' precision: a product of two bfloat16 numbers is exact in float32
        grad_gates = (grad_rows * rows.to(gates.dtype)).sum(-1).index_select(0, inverse).view(top_k, num_tokens).t()
        row_gates = gates.t().reshape(-1).index_select(0, order)
        row_gates = row_gates.to(grad.dtype).unsqueeze(-1)
        # in place to save a tensor of all rows; a second derivative needs grad_rows as it was
        grad_rows = grad_rows * row_gates if torch.is_grad_enabled() else grad_rows.mul_(row_gates)
        return grad_rows, grad_gates, None, None


def to_experts(x: Tensor, plan: Dispatch) -> Tensor:
    """Copies of the tokens x [N, D], sorted by expert: [S, D]. Differentiable in x."""
    return _ToExperts.apply(x, plan.order, plan.inverse)


def from_experts(rows: Tensor, gates: Tensor, plan: Dispatch) -> Tensor:
    """The mixture [N, D] of expert outputs rows [S, D] by gates [N, K]. Differentiable in both."""
    return _FromExperts.apply(rows, gates, plan.order, plan.inverse)


def kept_gates(gates: Tensor, plan: Dispatch) -> Tensor:
    """gates [N, K] with zeros for the slots that are over capacity."""
    if plan.kept is None:
        return gates
    kept = plan.kept.index_select(0, plan.inverse).view(gates.shape[1], -1).t()
    return gates * kept


def run_lengths(plan: Dispatch) -> Tensor:
    """Number of sorted rows of each expert, over capacity or not: [E] int32."""
    return plan.ends.diff(prepend=plan.ends.new_zeros(1))


def row_weights(gates: Tensor, plan: Dispatch) -> Tensor:
    """What each sorted row counts in its expert's sums of y and of g*y, [2, S], from the kept gates [N, K]."""
    used = gates.t().reshape(-1).index_select(0, plan.order)
    return torch.stack([torch.ones_like(used) if plan.kept is None else plan.kept.to(used.dtype), used])
