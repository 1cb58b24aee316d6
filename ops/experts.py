"""E expert MLPs applied to rows that are sorted by expert.

    y_r = gelu(x_r W_fc[e] + b_fc[e]) W_proj[e] + b_proj[e],   e the expert of row r

There are two kernels: `grouped_mm` for bfloat16 on GPUs where it does not synchronize, and a loop over the experts'
slices for everything else. The loop reads the experts' token counts on the host, once per layer.

Shapes: E experts, D model width, S rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.autograd import refuse_second_derivatives
from ops.dispatch import Dispatch, rows_per_expert
from ops.segment_sums import segment_sums

# Compute capabilities with a kernel for grouped_mm. Elsewhere it is a loop that synchronizes for each expert.
GROUPED_CAPABILITIES = ((9, 0), (10, 0))


class MLPExperts(nn.Module):
    """E MLPs of width 4 D, each applied to the rows routed to it.

    Args:
        num_experts: E.
        d_model: D.
        bias: give both linear layers a bias.
        dropout: dropout probability of the output.
    """

    def __init__(self, num_experts: int, d_model: int, bias: bool, dropout: float):
        super().__init__()
        E, D = num_experts, d_model
        self.c_fc = nn.Parameter(torch.empty(E, D, 4 * D))
        self.c_proj = nn.Parameter(torch.empty(E, 4 * D, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, 4 * D)) if bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if bias else None
        self.dropout = nn.Dropout(dropout)
        # None: grouped_mm where it does not synchronize, else the loop. True and False force one of the two.
        self.use_grouped_mm: bool | None = None

    def forward(self, rows: Tensor, plan: Dispatch, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the experts to rows [S, D], sorted by `plan`.

        Returns the outputs [S, D] and, given `weights` [W, S], each expert's sums of its outputs by these weights,
        [W, E, D], else None. The sums carry no gradient.
        """
        if self.uses_grouped_mm(rows):
            return self._forward_grouped(rows, plan, weights)
        return self._forward_loop(rows, plan, weights)

    def uses_grouped_mm(self, rows: Tensor) -> bool:
        """Whether rows [..., D] go through grouped_mm, under the autocast of the caller."""
        if self.use_grouped_mm is not None:
            return self.use_grouped_mm
        if rows.device.type != "cuda" or matmul_dtype(rows) != torch.bfloat16:
            return False
        # grouped_mm requires row strides that are multiples of 16 bytes
        return rows.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(rows.device) in GROUPED_CAPABILITIES

    def _forward_loop(self, rows: Tensor, plan: Dispatch, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        sizes = rows_per_expert(plan).tolist()
        tensors = [rows, self.c_fc, self.c_proj, self.fc_bias, self.proj_bias]
        tensors = [None if x is None else x.to(matmul_dtype(rows)) for x in tensors]
        y = self.dropout(_ExpertLoop.apply(*tensors, sizes, torch.is_grad_enabled()))
        if weights is None:
            return y, None
        with torch.autocast(y.device.type, enabled=False):
            sums = [_weighted_sum(*pair) for pair in zip(weights.split(sizes, dim=-1), y.split(sizes))]
        return y, torch.stack(sums, dim=1)

    def _forward_grouped(self, rows: Tensor, plan: Dispatch, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        one_hot = None
        if self.fc_bias is not None:
            one_hot = plan.experts.unsqueeze(-1) == torch.arange(len(self.c_fc), device=rows.device)
        h = _grouped_linear(rows, self.c_fc, self.fc_bias, plan, one_hot)
        y = self.dropout(_grouped_linear(F.gelu(h), self.c_proj, self.proj_bias, plan, one_hot))
        return y, None if weights is None else segment_sums(weights, y, plan.offsets)


class _ExpertLoop(torch.autograd.Function):
    """The experts one after the other.

    The backward is written out so that the gradient of each expert goes to its slice of that of all experts; autograd
    would build a second tensor of that size. The hidden rows of an expert are still in the cache when they are used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        c_fc: Tensor,
        c_proj: Tensor,
        fc_bias: Tensor | None,
        proj_bias: Tensor | None,
        sizes: list[int],
        save_for_backward: bool,
    ) -> Tensor:
        out, hidden, active = [], [], []
        for e, x in enumerate(rows.split(sizes)):
            h = _linear(x, c_fc[e], fc_bias, e)
            a = F.gelu(h)
            out.append(_linear(a, c_proj[e], proj_bias, e))
            if save_for_backward:
                hidden.append(h)
                active.append(a)
        ctx.save_for_backward(rows, c_fc, c_proj, *hidden, *active)
        ctx.sizes, ctx.has_bias = sizes, fc_bias is not None
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        rows, c_fc, c_proj, *saved = ctx.saved_tensors
        hidden, active = saved[: len(c_fc)], saved[len(c_fc) :]
        grad_rows, grad_fc, grad_proj = [], torch.empty_like(c_fc), torch.empty_like(c_proj)
        grad_biases = [grad.new_empty(len(c_fc), 1, c.shape[-1]) if ctx.has_bias else None for c in (c_fc, c_proj)]
        for e, (x, g) in enumerate(zip(rows.split(ctx.sizes), grad.split(ctx.sizes))):
            torch.mm(active[e].t(), g, out=grad_proj[e])
            grad_h = torch.ops.aten.gelu_backward(g @ c_proj[e].t(), hidden[e])
            torch.mm(x.t(), grad_h, out=grad_fc[e])
            grad_rows.append(grad_h @ c_fc[e].t())
            for bias, of_output in zip(grad_biases, (grad_h, g)):
                if bias is not None:
                    torch.sum(of_output, 0, keepdim=True, out=bias[e])
        return torch.cat(grad_rows), grad_fc, grad_proj, *grad_biases, None, None


def _linear(x: Tensor, weight: Tensor, biases: Tensor | None, e: int) -> Tensor:
    return x @ weight if biases is None else torch.addmm(biases[e], x, weight)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's where autocast is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Dispatch, one_hot: Tensor | None) -> Tensor:
    """Multiply each row of x [S, in] by its expert's weight [E, in, out], in bfloat16.

    Autocast does not cover grouped_mm, and other dtypes fall back to a path that synchronizes with the device.
    """
    out = F.grouped_mm(x.bfloat16(), weight.bfloat16(), offs=plan.offsets)
    if bias is None or one_hot is None:
        return out
    # bias[experts] would accumulate its gradient with atomics
    return out + one_hot.bfloat16() @ bias.squeeze(1).bfloat16()


def _weighted_sum(weights: Tensor, y: Tensor) -> Tensor:
    """weights [W, n] @ y [n, D] in the dtype of weights: phi from bfloat16 sums has an error of 2e-3."""
    return torch.mm(weights, y.detach().to(weights.dtype))
