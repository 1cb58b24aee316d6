"""Step 4: reduce beta where the biased routing disagrees with the clean routing.

    js      = 1/2 KL(p || m) + 1/2 KL(q || m),  m = (p + q) / 2        p clean, q biased at full strength
    overlap = sum_e max(0, q_e - p_e)
    r       = 1 up to a disagreement of `threshold`, 0 from 3 * threshold, linear between

Logarithms are natural. The disagreement is always measured at full strength (r = 1). Measured on the applied routing,
it would fall as soon as beta is weakened, and r would swing back to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def js_per_token(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Jensen-Shannon divergence, 0 to ln 2 nats, of distributions p and q over the experts; experts along `dim`.

    With t = (q - p) / (q + p) the summand is (p + q)/4 * (log(1 - t^2) + 2 t atanh(t)), which is accurate where p and
    q nearly agree and exactly 0 where they agree.
    """
    total = p + q
    precision = torch.finfo(total.dtype)
    most = 1 - precision.eps / 2  # keeps both logarithms finite where p or q is 0
    t = ((q - p) / total.clamp_min(precision.tiny)).clamp(-most, most)
    return (total * torch.log1p(-t * t).addcmul(t, t.atanh(), value=2)).sum(dim) / 4


def overlap_per_token(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    """Probability mass moved from p to q, 0 to 1 (total variation distance); experts along `dim`."""
    return (q - p).clamp_min(0).sum(dim)


def disagreement_per_token(p: Tensor, q: Tensor, signal: str, dim: int = -1) -> Tensor:
    """Disagreement of p and q by the bridge's `signal`, 'js' or 'overlap'; experts along `dim`."""
    return js_per_token(p, q, dim) if signal == "js" else overlap_per_token(p, q, dim)


def compute_js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence in nats over the tokens of p and q [N, E]: []."""
    return js_per_token(p, q).mean()


def compute_flip_rate(p: Tensor, q: Tensor, top_k: int = 1) -> Tensor:
    """Share of the top-k set that differs between p and q [N, E]: [], 0 to 1.

    With top_k=1, the share of tokens whose first expert changed.
    """
    return (clean_rank(p, q.topk(top_k, dim=-1).indices) >= top_k).to(p.dtype).mean()


def clean_rank(z: Tensor, experts: Tensor, by_expert: Tensor | None = None) -> Tensor:
    """Rank of each choice `experts` [..., N, K] among the logits z [..., N, E]: number of larger ones, [K, ..., N].

    A choice is among the K largest if its rank is below K. by_expert: z as [..., E, N], optional; avoids a transpose.
    """
    by_expert = z.transpose(-1, -2) if by_expert is None else by_expert
    chosen = z.gather(-1, experts).movedim(-1, 0).unsqueeze(-2)  # [K, ..., 1, N]
    return (by_expert > chosen).sum(-2)


def compute_relevance(disagreement: Tensor, threshold: float = 0.2) -> Tensor:
    """Strength r in [0, 1] with which beta is applied, elementwise, for a disagreement of any shape."""
    tiny = torch.finfo(disagreement.dtype).tiny  # a smaller threshold would be 0
    return (1.5 - disagreement / max(2 * threshold, tiny)).clamp(0, 1)


def reach(bias: float) -> dict[str, float]:
    """Largest disagreement that biases between -bias and bias (= k_max * logit_std) can cause, by signal.

    It is reached by two experts with clean p = Bernoulli(sigmoid(-bias)) and biased q = Bernoulli(sigmoid(bias)).
    """
    q = torch.tensor([bias, -bias], dtype=torch.float64).div(2).softmax(-1)
    return {"js": js_per_token(q.flip(-1), q).item(), "overlap": math.tanh(bias / 2)}


def bias_needed(signal: str, disagreement: float) -> float:
    """The smallest `bias` whose reach is `disagreement`; infinity if there is none."""
    if disagreement >= (math.log(2) if signal == "js" else 1.0):
        return math.inf
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reach(middle)[signal] < disagreement else (low, middle)
    return high
