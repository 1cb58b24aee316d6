"""How the routers of Hugging Face's mixture-of-experts models choose, family by family.

A rule repeats what the model's router does after its logits, with two inputs: the logits that decide the choice, and
those that decide the weights. Both are float32, so that a small beta is not rounded away; the weights are then rounded
to the dtype of the router's own. With both equal to the router's logits, a rule returns what the router returns. A
masked expert has a logit of -inf in both. Sources: models/*/modeling_*.py of transformers 5.24.

A new family is a rule and a line in FAMILIES, or an argument of `attach`:

    def rule(router, choice, gates):                   # float32 logits [N, E]
        experts = choice.topk(router.top_k, dim=-1).indices
        return gates.gather(-1, experts).softmax(-1), experts

    attach(model, config, families=[Family("MyRouter", rule)])

Shapes: N tokens, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rule = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


class Family(NamedTuple):
    """A kind of router, which must have `num_experts` and `top_k`, and return (logits [N, E], weights [N, K], experts
    [N, K]). The experts module must be called as experts(hidden [N, D], experts [N, K], weights [N, K]).
    """

    router: str  # its class
    rule: Rule  # (router, logits of the choice, logits of the weights) -> (weights, experts)
    experts: str = "experts"  # attribute of the router's parent that holds the experts module


def softmax_top_k(router: Any, choice: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the K largest: OLMoE and Qwen3-MoE. `norm_topk_prob` makes them sum to 1."""
    return _softmax_top_k(router, choice, gates, router.norm_topk_prob)


def renormalized_softmax_top_k(router: Any, choice: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the K largest, which are made to sum to 1: Mixtral."""
    return _softmax_top_k(router, choice, gates, True)


def _softmax_top_k(router: Any, choice: Tensor, gates: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    experts = choice.softmax(-1).topk(router.top_k, dim=-1).indices
    weights = gates.softmax(-1).gather(-1, experts)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), experts


def top_k_softmax(router: Any, choice: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The K largest logits, then the softmax over them: gpt-oss."""
    experts = choice.topk(router.top_k, dim=-1).indices
    return gates.gather(-1, experts).softmax(-1), experts


def sigmoid_groups(router: Any, choice: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoids; the K largest with the correction bias, from the best groups of experts: DeepSeek-V3."""
    is_masked = choice == -torch.inf  # the correction bias could lift its sigmoid of 0 above others
    scores = (choice.sigmoid() + router.e_score_correction_bias).masked_fill(is_masked, -torch.inf)
    by_group = scores.view(len(scores), router.num_group, -1)
    # a masked expert adds nothing to its group
    of_group = by_group.masked_fill(by_group == -torch.inf, 0.0).topk(2, dim=-1).values.sum(-1)
    best = of_group.topk(router.topk_group, dim=-1, sorted=False).indices
    is_best = torch.zeros_like(of_group).scatter(1, best, 1.0).bool().unsqueeze(-1)
    allowed = by_group.masked_fill(~is_best, -torch.inf).flatten(1)
    experts = allowed.topk(router.top_k, dim=-1, sorted=False).indices
    weights = gates.sigmoid().gather(1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, experts


FAMILIES = (
    Family("OlmoeTopKRouter", softmax_top_k),
    Family("MixtralTopKRouter", renormalized_softmax_top_k),
    Family("Qwen3MoeTopKRouter", softmax_top_k),
    Family("DeepseekV3TopkRouter", sigmoid_groups),
    Family("GptOssTopKRouter", top_k_softmax),
)
