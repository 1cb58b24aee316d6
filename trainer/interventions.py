"""Mask experts of a trained model, or zero their outputs, and measure the loss.

A masked expert has a routing logit of -inf: its tokens go to their next best experts, and the gates are those of a
router without it. The capacity of the others does not change.

Shapes: L MoE layers, E experts, N tokens of a batch, K top_k, S = K * N slots, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from chronomoe import Routing
from chronomoe.coherence import coherence
from model import GPT, MOELayer
from ops.cross_entropy import linear_cross_entropy
from ops.dispatch import Dispatch, from_experts, kept_gates, row_weights

Masks = Mapping[int, tuple[int, ...]]  # masked experts by transformer block


def mask_key(masks: Masks) -> str:
    """The masks as text, for example "0:1,5;2:3"."""
    return ";".join(f"{block}:{','.join(map(str, sorted(experts)))}" for block, experts in sorted(masks.items()))


def moe_layer(model: GPT, block: int) -> MOELayer:
    """The MoE layer of a transformer block."""
    layer = model.transformer.h[block].mlp
    assert isinstance(layer, MOELayer)
    return layer


@contextlib.contextmanager
def masked(model: GPT, masks: Masks) -> Iterator[None]:
    """Mask experts in every forward. Raises ValueError if a layer has fewer than top_k experts left."""
    with contextlib.ExitStack() as stack:
        for block, experts in masks.items():
            router = moe_layer(model, block).router
            mask = torch.zeros(router.num_experts, dtype=torch.bool, device=router.w_g.weight.device)
            mask[list(experts)] = True
            if router.num_experts - int(mask.sum()) < router.top_k:
                raise ValueError(f"block {block}: {len(experts)} masked experts leave fewer than top_k={router.top_k}")
            # of the linear layer, so that noise and bias are added to -inf
            stack.enter_context(hooked(router.w_g, lambda _, __, z, mask=mask: z.masked_fill(mask, -torch.inf)))
        yield


@contextlib.contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a forward hook, hook(module, inputs, output), while the block is open."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class LayerSums:
    """Sums over the tokens of a batch that each expert processed, [E] float64. Tokens over capacity do not count."""

    tokens: Tensor  # number of tokens
    gate: Tensor  # g
    norm: Tensor  # |y|, y the expert's output
    gated_norm: Tensor  # g |y|
    first_order: Tensor  # |g dL/dg|, L the batch's mean loss
    phi: Tensor  # coherence with the mixture
    phi_leave_one_out: Tensor  # coherence with the mixture without the expert's own part


SUMS = tuple(f.name for f in fields(LayerSums))


@dataclass
class _Layer:
    """What one MoE layer did in the forward of a batch."""

    residual: Tensor  # [B, T, D], the mixture is added to it
    tokens: Tensor  # [N, D] its input
    routing: Routing
    plan: Dispatch
    rows: Tensor  # [S, D] expert outputs, sorted by expert
    mixture: Tensor  # [N, D]


class Batch:
    """A batch with the activations from which interventions start.

    Args:
        model: in eval mode, without dropout and router noise; its parameters must not require gradients.
        inputs: [B, T] token ids.
        targets: [B, T] token ids.
        criteria: also compute `sums`, which takes a backward.
    """

    def __init__(self, model: GPT, inputs: Tensor, targets: Tensor, criteria: bool = True):
        self.model, self.targets = model, targets.flatten()
        self.biases = dict(zip(model.config.moe_blocks, model.router_state.layer_biases()))
        found: dict[int, dict[str, Any]] = {block: {} for block in self.biases}

        def keep(block: int, name: str, what: Callable[..., Any]) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                found[block][name] = what(inputs, output)

            return hook

        def gates_with_gradient(inputs: Any, routing: Routing) -> Routing:
            if criteria and not routing.gates.requires_grad:
                routing.gates.requires_grad_()
            return routing

        with contextlib.ExitStack() as stack, torch.set_grad_enabled(criteria):
            for block in self.biases:
                layer = moe_layer(model, block)
                norm = cast(nn.Module, model.transformer.h[block].ln_2)
                for module, name, what in (
                    (norm, "residual", lambda inputs, _: inputs[0].detach()),
                    (layer.router, "routing", gates_with_gradient),
                    (layer.router, "tokens", lambda inputs, _: inputs[0].detach()),
                    (layer.experts, "plan", lambda inputs, _: inputs[1]),
                    (layer.experts, "rows", lambda _, output: output[0].detach()),
                    (layer, "mixture", lambda _, output: output[0].detach().flatten(0, 1)),
                ):
                    stack.enter_context(hooked(module, keep(block, name, what)))
            loss = model(inputs, targets, return_logits=False)[1]
        self.layers = {block: _Layer(**values) for block, values in found.items()}
        self.loss = loss.item()
        self.sums: list[LayerSums] = []  # of each layer
        if criteria:
            gradients = torch.autograd.grad(loss, [layer.routing.gates for layer in self.layers.values()])
            self.sums = [_sums(*pair) for pair in zip(self.layers.values(), gradients)]

    @torch.no_grad()
    def loss_masked(self, masks: Masks) -> float:
        """The loss with masked experts. Layers below the first masked one are not computed again.

        Raises ValueError if a layer has fewer than top_k experts left.
        """
        block = min(masks)
        layer, module = self.layers[block], moe_layer(self.model, block)
        experts = torch.tensor(masks[block], device=layer.tokens.device)
        changed = torch.isin(layer.routing.experts, experts).any(-1)
        if not self._only_users_change(module, len(changed)):
            changed[:] = True
        with masked(self.model, masks):
            mixture = layer.mixture.clone()
            if changed.any():
                mixture[changed] = module(layer.tokens[changed][None], self.biases[block], False)[0][0]
            return self._loss_above(block, mixture)

    @staticmethod
    def _only_users_change(module: MOELayer, num_tokens: int) -> bool:
        """Whether masking experts of a layer changes only the tokens that use them."""
        router = module.router
        gates_of_chosen = router.norm_topk_prob  # else the gates are a softmax over all experts, the masked ones too
        bias_per_token = router.config.bridge and router.config.bridge_scope == "token"  # r depends on all logits
        displaces = module.capacity(num_tokens) is not None  # a token that moves can displace another one
        return gates_of_chosen and not bias_per_token and not displaces

    @torch.no_grad()
    def loss_zeroed(self, block: int, expert: int) -> float:
        """The loss with the outputs of one expert set to zero. Routing and gates of its layer do not change."""
        layer = self.layers[block]
        gates = kept_gates(layer.routing.gates, layer.plan) * (layer.routing.experts != expert)
        return self._loss_above(block, from_experts(layer.rows, gates.to(layer.routing.gates.dtype), layer.plan))

    def _loss_above(self, block: int, mixture: Tensor) -> float:
        """The loss if the layer of a block has this mixture [N, D]."""
        t, residual = self.model.transformer, self.layers[block].residual
        x = residual + mixture.view_as(residual)
        for i in range(block + 1, len(t.h)):
            x, _ = t.h[i](x, self.biases.get(i), False)
        return linear_cross_entropy(t.ln_f(x).flatten(0, 1), self.model.lm_head.weight, self.targets).item()


@torch.no_grad()
def _sums(layer: _Layer, grad: Tensor) -> LayerSums:
    """The sums of a layer, from dL/dg [N, K]."""
    routing, plan = layer.routing, layer.plan
    kept, used = row_weights(kept_gates(routing.gates, plan), plan)
    first_order = (routing.gates * grad).abs().t().reshape(-1)[plan.order]
    return expert_sums(plan.experts, layer.rows, kept, used, first_order, len(plan.offsets))


@torch.no_grad()
def expert_sums(
    experts: Tensor, y: Tensor, kept: Tensor, gates: Tensor, first_order: Tensor, num_experts: int
) -> LayerSums:
    """The sums per expert over S slots.

    experts [S], outputs y [S, D]; [S] each: kept (1, or 0 over capacity), gates, and first_order |g dL/dg|.
    """
    # on the CPU, because not every device has float64
    experts = experts.cpu().long()
    y, kept, gates, first_order = (x.cpu().double() for x in (y, kept, gates, first_order))
    norm = y.norm(dim=-1)

    def per_expert(values: Tensor) -> Tensor:
        return values.new_zeros(num_experts, *values.shape[1:]).index_add(0, experts, values)

    outputs = per_expert(y * kept[:, None]), per_expert(y * gates[:, None])
    return LayerSums(
        tokens=per_expert(kept),
        gate=per_expert(gates),
        norm=per_expert(kept * norm),
        gated_norm=per_expert(gates * norm),
        first_order=per_expert(first_order * kept),
        phi=coherence(*outputs, "mixture"),
        phi_leave_one_out=coherence(*outputs, "leave_one_out"),
    )
