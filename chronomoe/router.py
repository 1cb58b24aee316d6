"""Step 1: a router with two distributions, clean and biased.

    z_clean  = h W_g^T (+ noise)                                [N, E]
    beta_eff = clamp(beta_coeff, -k_max, k_max) * logit_std     [E]
    z_biased = z_clean + r * beta_eff                           [N, E]

logit_std is measured on h W_g^T without the noise, because evaluation routes without it.

Tokens go to the top K of z_biased, weighed by the softmax over those K or over all E. beta_coeff, logit_std and r are
read here and written by ChronoLoop only, after the optimizer step.

Shapes: L MoE layers, E experts, N tokens, K top_k, D model width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe.bridge import compute_relevance, disagreement_per_token
from chronomoe.config import ChronoConfig
from chronomoe.state import StateModule, widened
from chronomoe.trace import MoETrace


class RouterBias(NamedTuple):
    """What one layer's router reads of RouterState in a forward."""

    beta_eff: Tensor  # [E] bias on the logits at full strength
    relevance: Tensor  # [] strength of the last step's bridge, 0 to 1


class RouterState(StateModule):
    """beta and what scales it, for all L MoE layers.

    Buffers: beta_coeff [L, E], scale-free; logit_std [L], the EMA of the standard deviation of the noise-free logits
    over the experts of a token (divisor E - 1), pooled over tokens, 1 until first observed; disagreement [L], of the
    last step at full strength, and relevance [L], r, which follows from it; updates [], the number of observations of
    logit_std.
    """

    def __init__(self, num_layers: int, num_experts: int, config: ChronoConfig):
        super().__init__()
        self.config = config
        self.register_buffer("beta_coeff", torch.zeros(num_layers, num_experts, dtype=torch.float32))
        self.register_buffer("logit_std", torch.ones(num_layers, dtype=torch.float32))
        self.register_buffer("disagreement", torch.zeros(num_layers, dtype=torch.float32))
        self.register_buffer("relevance", torch.ones(num_layers, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def compute_beta_eff(self) -> Tensor:
        """The bias on the logits at full strength, [L, E]."""
        k_max = self.config.k_max
        return self.beta_coeff.clamp(-k_max, k_max) * self.logit_std.unsqueeze(-1)

    def layer_biases(self) -> list[RouterBias | None]:
        """What each layer's router reads: one RouterBias a layer, or None where step 1 is off."""
        if not self.config.router:
            return [None] * len(self.logit_std)
        relevance = self.relevance if self.config.bridge else torch.ones_like(self.relevance)
        return [RouterBias(*pair) for pair in zip(self.compute_beta_eff().unbind(0), relevance.unbind(0))]

    @torch.no_grad()
    def update(self, trace: MoETrace, ok: Tensor) -> None:
        """Take in one step's sums; where `ok` [] bool is False nothing changes."""
        config = self.config
        std = (trace.logit_var / trace.tokens).sqrt()
        # the first observation is taken whole
        weight = (self.updates == 0).to(std.dtype).clamp_min(1 - config.logit_std_alpha)
        # finite even where ok: a logit of -inf leaves loss and gradient finite, and its variance is none
        good = ok & (std < torch.inf)
        self.logit_std.lerp_(torch.where(good, std, self.logit_std), weight)
        self.updates += ok
        if config.bridge:
            seen = trace.disagreement / trace.tokens
            self.disagreement.copy_(torch.where(ok & (seen < torch.inf), seen, self.disagreement))
            self.relevance.copy_(compute_relevance(self.disagreement, config.disagreement_threshold))


class Routing(NamedTuple):
    """Where N tokens go."""

    experts: Tensor  # [N, K] int64, by falling biased logit
    gates: Tensor  # [N, K] float32; each row sums to 1, or to at most 1 with norm_topk_prob=False
    z_clean: Tensor  # [N, E], with the router's noise
    noise_free: Tensor | None  # [N, E] z_clean without its noise; None: it has none
    z_biased: Tensor  # [N, E]
    chosen: Tensor  # [E] slots that chose the expert
    aux_loss: Tensor  # [], with a gradient
    router_z_loss: Tensor  # [], with a gradient
    bias: RouterBias | None  # as given
    relevance: Tensor | None  # [] or [N, 1], the strength with which the bias was applied; None without a bias


class ChronoRouter(nn.Module):
    """Top-k router whose logits take a slow bias; with no bias it is nanoMoE's noisy top-k router.

    Args:
        d_model: width D of the hidden states.
        num_experts: E.
        top_k: experts a token, 1 to E.
        config: the loop's settings; the router reads `router`, `gates` and the bridge's.
        norm_topk_prob: gates are the softmax over the chosen K; False: over all E, taken at the chosen. With top_k=1
            and True every gate is exactly 1, so W_g gets no gradient through the gates.
        noisy: learnt noise on the logits while training (https://arxiv.org/abs/1701.06538, eq. 4).
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
        """z_clean [N, E] from hidden states x [N, D], and the same without noise, or None if there is no noise.

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
        """Route hidden states x [N, D]."""
        z_clean, noise_free = self.clean_logits(x)
        z_biased, relevance = z_clean, None
        if bias is not None:
            # The bias is state: constant to autograd, and added in at least float32.
            relevance = self._relevance(z_clean, bias)
            z_biased = z_clean + relevance * bias.beta_eff

        chosen, experts = z_biased.topk(self.top_k, dim=-1)
        if bias is not None and self.config.gates == "clean":
            gates = self.gates_of(z_clean.gather(-1, experts), z_clean)
        else:
            gates = self.gates_of(chosen, z_biased)

        # Switch Transformer, https://arxiv.org/abs/2101.03961 eq. 4 to 6, on the gates and the choice that are used.
        gate_of_expert = torch.zeros_like(z_clean).scatter(-1, experts, gates)
        chose = torch.zeros_like(z_clean).scatter(-1, experts, 1.0).sum(0)
        aux_loss = self.num_experts * (gate_of_expert.mean(0) * (chose / len(x))).sum()
        # ST-MoE, https://arxiv.org/abs/2202.08906 eq. 5.
        router_z_loss = z_clean.logsumexp(-1).square().mean()
        return Routing(experts, gates, z_clean, noise_free, z_biased, chose, aux_loss, router_z_loss, bias, relevance)

    def gates_of(self, chosen: Tensor, logits: Tensor) -> Tensor:
        """Gates [N, K] of experts with logits `chosen` [N, K] among all experts' `logits` [N, E]."""
        if self.norm_topk_prob:
            return chosen.softmax(-1)
        return (chosen - logits.logsumexp(-1, keepdim=True)).exp()

    @torch.no_grad()
    def _relevance(self, z_clean: Tensor, bias: RouterBias) -> Tensor:
        """How strongly to apply the bias: [], or [N, 1] where each token is judged by itself."""
        config = self.config
        if not (config.bridge and config.bridge_scope == "token"):
            return bias.relevance.to(z_clean.dtype)
        z = z_clean.t().contiguous()  # [E, N], see statistics.py
        p, q = z.softmax(0), (z + bias.beta_eff.unsqueeze(-1)).softmax(0)
        disagreement = disagreement_per_token(p, q, config.bridge_signal, dim=0)
        return compute_relevance(disagreement, config.disagreement_threshold).unsqueeze(-1)
