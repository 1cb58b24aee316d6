"""Step 4: how far beta disagrees with the router, and how much of it to apply.

    js      = 1/2 KL(p || m) + 1/2 KL(q || m),  m = (p + q) / 2        p clean, q biased at full strength
    overlap = sum_e max(0, q_e - p_e)
    r       = 1 up to a disagreement of `threshold`, 0 from 3 * threshold, linear between

Logarithms are natural. The disagreement is always that of full strength (r = 1): taken from the routing that was
really used, r would see little disagreement once beta is weak, and swing back to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def js_per_token(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Jensen-Shannon divergence in nats, 0 to ln 2, of distributions p and q over the experts, which `dim` counts.

    With t = (q - p) / (q + p) the summand is (p + q)/4 * (log(1 - t^2) + 2 t atanh(t)), which stays accurate where p
    and q nearly agree and is exactly 0 where they agree.
    """
    total = p + q
    precision = torch.finfo(total.dtype)
    most = 1 - precision.eps / 2  # where one of the two is 0, so that neither logarithm is infinite
    t = ((q - p) / total.clamp_min(precision.tiny)).clamp(-most, most)
    return (total * torch.log1p(-t * t).addcmul(t, t.atanh(), value=2)).sum(dim) / 4


def overlap_per_token(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Probability mass that moved from p to q, 0 to 1 (the total variation distance); experts along `dim`."""
    return (q - p).clamp_min(0).sum(dim)


def disagreement_per_token(p: Tensor, q: Tensor, signal: str, dim: int = -1) -> Tensor:
    """The disagreement that the bridge reads, `signal` 'js' or 'overlap', of p and q; experts along `dim`."""
    return js_per_token(p, q, dim) if signal == "js" else overlap_per_token(p, q, dim)


def compute_js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence in nats over the tokens of p and q [N, E]: a 0-d tensor on their device."""
    return js_per_token(p, q).mean()


def compute_flip_rate(p: Tensor, q: Tensor, top_k: int = 1) -> Tensor:
    """Share of the top-k set that differs between p and q [N, E]: a 0-d tensor on their device, 0 to 1.

    With top_k=1 the share of tokens whose first expert changed.
    """
    return (clean_rank(p, q.topk(top_k, dim=-1).indices) >= top_k).to(p.dtype).mean()


def clean_rank(z: Tensor, experts: Tensor, by_expert: Tensor | None = None) -> Tensor:
    """How many of the values z [..., N, E] are larger than that of each choice `experts` [..., N, K]: [K, ..., N].

    A choice is among the K largest if its rank is below K. by_expert: z as [..., E, N], if the caller has it.
    """
    by_expert = z.transpose(-1, -2) if by_expert is None else by_expert
    chosen = z.gather(-1, experts).movedim(-1, 0).unsqueeze(-2)  # [K, ..., 1, N]
    return (by_expert > chosen).sum(-2)


def compute_relevance(disagreement: Tensor, threshold: float = 0.2) -> Tensor:
    """Strength r in [0, 1] with which beta is applied at a disagreement of any shape, elementwise."""
    return (1.5 - disagreement / (2 * threshold)).clamp(0, 1)


def reach(bias: float) -> dict[str, float]:
    """Largest disagreement that biases within plus and minus `bias` (= k_max * logit_std) can cause.

    It is that of two experts with p = Bernoulli(sigmoid(-bias)) clean and Bernoulli(sigmoid(bias)) biased.
    """
    q = torch.tensor([bias, -bias], dtype=torch.float64).div(2).softmax(-1)
    return {"js": js_per_token(q.flip(-1), q).item(), "overlap": math.tanh(bias / 2)}


def bias_needed(signal: str, disagreement: float) -> float:
    """The smallest `bias` whose reach is `disagreement`, or infinity if none is."""
    if disagreement >= (math.log(2) if signal == "js" else 1.0):
        return math.inf
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reach(middle)[signal] < disagreement else (low, middle)
    return high
