"""Step 1: a top-k router with clean and biased logits.

    z_clean  = h W_g^T (+ noise)                                [N, E]
    beta_eff = clamp(beta_coeff, -k_max, k_max) * logit_std     [E]
    z_biased = z_clean + r * beta_eff                           [N, E]

Tokens go to the top K of z_biased. Gates are the softmax over those K, or over all E. logit_std is measured on h W_g^T
without noise, because evaluation has none. This file reads beta_coeff, logit_std and r; only ChronoLoop writes them,
after the optimizer step.

Shapes: L MoE layers, E experts, N tokens, K top_k, D model width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe.bridge import compute_relevance, disagreement_per_token
from chronomoe.config import ChronoConfig
from chronomoe.state import StateModule, widened
from chronomoe.trace import MoETrace


class RouterBias(NamedTuple):
    """One layer's bias in a forward."""

    beta_eff: Tensor  # [E] bias on the logits at full strength
    relevance: Tensor  # [] strength r set by the bridge in the last step, 0 to 1
    probe: Tensor | None = None  # [E] zeros whose gradient is the sum of |g dL/dg|, see RouterState.probe


class RouterState(StateModule):
    """beta and its scale, for all L MoE layers.

    logit_std is the EMA of the standard deviation of the noise-free logits over the experts (divisor E - 1), pooled
    over tokens; 1 before the first observation.
    """

    beta_coeff: Tensor  # [L, E] in units of logit_std
    logit_std: Tensor  # [L]
    disagreement: Tensor  # [L] of the last step, at full strength
    relevance: Tensor  # [L] r, computed from disagreement
    updates: Tensor  # [] int64, number of observations that were finite in all layers
    probe: Tensor | None  # [L, E] zeros, not saved; backward adds the sum of |g dL/dg| to its gradient

    def __init__(self, num_layers: int, num_experts: int, config: ChronoConfig):
        super().__init__()
        self.config = config
        self.register_buffer("beta_coeff", torch.zeros(num_layers, num_experts, dtype=torch.float32))
        self.register_buffer("logit_std", torch.ones(num_layers, dtype=torch.float32))
        self.register_buffer("disagreement", torch.zeros(num_layers, dtype=torch.float32))
        self.register_buffer("relevance", torch.ones(num_layers, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        probe = None
        if config.measures("first_order"):
            probe = torch.zeros(num_layers, num_experts, dtype=torch.float32, requires_grad=True)
        self.register_buffer("probe", probe, persistent=False)

    def compute_beta_eff(self) -> Tensor:
        """The bias on the logits at full strength, [L, E]."""
        k_max = self.config.k_max  # it can be lower than when beta was updated
        return self.beta_coeff.clamp(-k_max, k_max) * self.logit_std.unsqueeze(-1)

    def layer_biases(self) -> list[RouterBias | None]:
        """One RouterBias per layer; None where step 1 is off."""
        if not self.config.router:
            return [None] * len(self.logit_std)
        relevance = self.relevance if self.config.bridge else torch.ones_like(self.relevance)
        probes = [None] * len(relevance) if self.probe is None else self.probe.unbind(0)
        return [RouterBias(*values) for values in zip(self.compute_beta_eff().unbind(0), relevance.unbind(0), probes)]

    @torch.no_grad()
    def update(self, trace: MoETrace, ok: Tensor) -> None:
        """Update from one step's trace. Where `ok` [] bool is False nothing changes."""
        config = self.config
        std = (trace.required("logit_var") / trace.tokens).sqrt()
        # the first observation has a weight of 1
        weight = (self.updates == 0).to(std.dtype).clamp_min(1 - config.logit_std_alpha)
        # a logit of -inf has a variance that is not finite, while loss and gradient are finite
        good = ok & (std < torch.inf)
        self.logit_std.lerp_(torch.where(good, std, self.logit_std), weight)
        self.updates += good.all()
        if config.bridge:
            seen = trace.required("disagreement") / trace.tokens
            self.disagreement.copy_(torch.where(ok & (seen < torch.inf), seen, self.disagreement))
            self.relevance.copy_(compute_relevance(self.disagreement, config.disagreement_threshold))


class FirstOrder(torch.autograd.Function):
    """Returns the gates [N, K]. The backward gives the probe [E] the gradient sum over tokens of |g dL/dg|.

    As a gradient, the sum needs no hook, and adds over micro-batches by itself.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, experts: Tensor, probe: Tensor) -> Tensor:
        ctx.save_for_backward(gates, experts)
        ctx.num_experts = len(probe)
        return gates.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, experts = ctx.saved_tensors
        of_expert = gates.new_zeros(len(gates), ctx.num_experts).scatter(-1, experts, (gates * grad).abs())
        return grad, None, of_expert.sum(0)


class Routing(NamedTuple):
    """The routing of N tokens."""

    experts: Tensor  # [N, K] int64, ordered by falling biased logit
    gates: Tensor  # [N, K] float32; each row sums to 1, or to at most 1 with norm_topk_prob=False
    z_clean: Tensor  # [N, E], with router noise
    noise_free: Tensor | None  # [N, E] z_clean without noise; None if there is no noise
    z_biased: Tensor  # [N, E]
    tokens_per_expert: Tensor  # [E] tokens routed to each expert
    aux_loss: Tensor  # [], with a gradient
    router_z_loss: Tensor  # [], with a gradient
    bias: RouterBias | None  # the argument of forward
    relevance: Tensor | None  # [] or [N, 1], strength with which the bias was applied; None without a bias


class ChronoRouter(nn.Module):
    """Top-k router whose logits take a slow bias; with no bias it is nanoMoE's noisy top-k router.

    Args:
        d_model: width D of the hidden states.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        config: settings of the loop.
        norm_topk_prob: True: gates are the softmax over the K chosen logits. False: over all E logits. With True and
            top_k=1 every gate is 1, so W_g receives no gradient through the gates.
        noisy: add learnt noise to the logits in training (https://arxiv.org/abs/1701.06538, eq. 4).
        full_precision: compute the logits in float32 under autocast (https://arxiv.org/abs/2101.03961, section 2.4).

    Raises ValueError if top_k is not in 1..E.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        config: ChronoConfig = ChronoConfig(),
        *,
        norm_topk_prob: bool = True,
        noisy: bool = False,
        full_precision: bool = False,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and the number of experts, {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        self.norm_topk_prob = norm_topk_prob
        self.full_precision = full_precision
        self.w_g = nn.Linear(d_model, num_experts, bias=False)
        self.w_noise = nn.Linear(d_model, num_experts, bias=False) if noisy else None

    def clean_logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """z_clean [N, E] of hidden states x [N, D], and the same without noise (None if there is no noise).

        In float32, or float64 for float64 input.
        """
        exact = torch.autocast(x.device.type, enabled=False) if self.full_precision else nullcontext()
        with exact:
            x = x.to(self.w_g.weight.dtype) if self.full_precision else x
            logits = self.w_g(x)
            if self.w_noise is not None and self.training:
                scale = F.softplus(self.w_noise(x))
                return widened(logits + scale * torch.randn_like(scale)), widened(logits)
        return widened(logits), None

    def forward(self, x: Tensor, bias: RouterBias | None = None) -> Routing:
        """Route hidden states x [N, D].

        bias: this layer's of RouterState.layer_biases(); None: no bias. Raises ValueError for other shapes.
        """
        if x.dim() != 2:
            raise ValueError(f"hidden states of shape {list(x.shape)} must be [N, D]: flatten batch and time")
        if bias is not None and bias.beta_eff.shape != (self.num_experts,):
            raise ValueError(
                f"the bias has shape {list(bias.beta_eff.shape)}, and the layer {self.num_experts} experts"
            )
        z_clean, noise_free = self.clean_logits(x)
        z_biased, relevance = z_clean, None
        if bias is not None:
            # the bias is state: it has no gradient, and is added in at least float32
            relevance = applied_relevance(z_clean, bias, self.config)
            z_biased = z_clean + relevance * bias.beta_eff

        top_logits, experts = z_biased.topk(self.top_k, dim=-1)
        if bias is not None and self.config.gates == "clean":
            gates = self.gates_of(z_clean.gather(-1, experts), z_clean)
        else:
            gates = self.gates_of(top_logits, z_biased)

        gates_of_mixture = gates
        if bias is not None and bias.probe is not None and torch.is_grad_enabled():
            gates_of_mixture = FirstOrder.apply(gates, experts, bias.probe)

        # Switch Transformer, https://arxiv.org/abs/2101.03961 eq. 4 to 6, on the applied gates and choices.
        gate_of_expert = torch.zeros_like(z_clean).scatter(-1, experts, gates)
        tokens_per_expert = torch.zeros_like(z_clean).scatter(-1, experts, 1.0).sum(0)
        aux_loss = self.num_experts * (gate_of_expert.mean(0) * (tokens_per_expert / len(x))).sum()
        # ST-MoE, https://arxiv.org/abs/2202.08906 eq. 5.
        router_z_loss = z_clean.logsumexp(-1).square().mean()
        return Routing(
            experts, gates_of_mixture, z_clean, noise_free, z_biased,
            tokens_per_expert, aux_loss, router_z_loss, bias, relevance,
        )  # fmt: skip

    def gates_of(self, top_logits: Tensor, logits: Tensor) -> Tensor:
        """Gates [N, K] from the logits of the chosen experts [N, K] and of all experts [N, E]."""
        if self.norm_topk_prob:
            return top_logits.softmax(-1)
        return (top_logits - logits.logsumexp(-1, keepdim=True)).exp()


@torch.no_grad()
def applied_relevance(z_clean: Tensor, bias: RouterBias, config: ChronoConfig) -> Tensor:
    """Strength r of the bias on clean logits [N, E]: [], or [N, 1] with bridge_scope='token'."""
    if not (config.bridge and config.bridge_scope == "token"):
        return bias.relevance.to(z_clean.dtype)
    z = z_clean.t().contiguous()  # [E, N], see statistics.py
    p, q = z.softmax(0), (z + bias.beta_eff.unsqueeze(-1)).softmax(0)
    disagreement = disagreement_per_token(p, q, config.bridge_signal, dim=0)
    return compute_relevance(disagreement, config.disagreement_threshold).unsqueeze(-1)
