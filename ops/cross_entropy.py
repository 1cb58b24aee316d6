"""Cross-entropy of an output layer, computed in chunks so that the logits are never all in memory.

    logits z = x W^T,   loss = mean over counted tokens of logsumexp(z) - z_target
    dz = (softmax(z) - onehot(target)) / count,   dx = dz W,   dW = dz^T x

With a vocabulary of 50,000 the logits are by far the largest tensor of a small model, and a step reads and writes them
about six times. Here the forward takes one chunk of tokens at a time and computes the gradients of that chunk at once.
The logits of a chunk are freed before the next chunk, and no matmul is done twice.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.autograd import refuse_second_derivatives

# Logits in memory at a time, by device: 128 MB in float32, or 512 MB where a chunk of many tokens has fewer kernels.
MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 27}
IGNORED = -1  # target that does not count


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, max_logits: int | None = None) -> Tensor:
    """Mean cross-entropy in nats, [], of the logits x @ weight.T for x [N, D], weight [V, D] and targets [N].

    Targets of -1 do not count; the loss is NaN if none counts. Any other target outside 0..V-1 raises IndexError or
    RuntimeError on a CPU and fails a device-side assertion on CUDA. Differentiable once, in x and weight. At most
    `max_logits` logits (None: MAX_LOGITS of the device) are in memory at a time; a smaller problem uses torch's own
    operators.
    """
    if max_logits is None:
        max_logits = MAX_LOGITS.get(x.device.type, MAX_LOGITS["cpu"])
    if len(x) * len(weight) <= max_logits:
        return F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORED)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, max(max_logits // len(weight), 1), with_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, with_grad: bool) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            counted = targets != IGNORED
            places = targets.where(counted, 0).unsqueeze(-1)
            total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
            dx = torch.empty_like(x) if with_grad else None
            dw = torch.empty_like(weight, dtype=total.dtype) if with_grad else None
            logits = x.new_empty(min(chunk, len(x)), len(w), dtype=dtype)
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                x_part, place, mask = x[part].to(dtype), places[part], counted[part].unsqueeze(-1)
                z = torch.mm(x_part, w.t(), out=logits[: len(x_part)]).to(total.dtype)
                z_target = z.gather(-1, place)
                largest = z.amax(-1, keepdim=True)
                p = z.sub_(largest).exp_()  # softmax times `total_p`
                total_p = p.sum(-1, keepdim=True)
                total += ((largest + total_p.log() - z_target) * mask).sum()
                if dx is not None and dw is not None:
                    # gradient of the logits; backward multiplies by 1 / count
                    p.mul_(mask / total_p).scatter_add_(-1, place, -mask.to(p.dtype))
                    dz = p.to(dtype)
                    dx[part] = dz @ w
                    if dtype == dw.dtype:
                        dw.addmm_(dz.t(), x_part, beta=float(start > 0))
                    elif start == 0:
                        dw.copy_(dz.t() @ x_part)
                    else:
                        dw += dz.t() @ x_part
        count = counted.sum()
        ctx.save_for_backward(dx, dw, count)
        ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        dx, dw, count = ctx.saved_tensors
        factor = grad / count
        return (dx * factor).to(ctx.dtypes[0]), (dw * factor).to(ctx.dtypes[1]), None, None, None
