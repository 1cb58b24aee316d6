"""Slow versions to compare with: loops over tokens and experts, written from the equations, sharing no code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def js_divergence(p: list[float], q: list[float]) -> float:
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    m = [(x + y) / 2 for x, y in zip(p, q)]
    return (kl(p, m) + kl(q, m)) / 2


def routing_statistics(z_clean: Tensor, bias: Tensor, top_k: int) -> dict[str, float]:
    """Means over tokens for clean logits [N, E] and a bias [E]: js, overlap, flip, flip_set, neff, logit_std."""
    rows = z_clean.double().tolist()
    offsets = bias.double().tolist()
    experts = range(len(offsets))
    js = overlap = flip = flip_set = variance = 0.0
    mean_q = [0.0 for _ in experts]
    for z in rows:
        biased = [z[e] + offsets[e] for e in experts]
        p, q = softmax(z), softmax(biased)
        js += js_divergence(p, q)
        overlap += sum(max(0.0, b - a) for a, b in zip(p, q))
        best = sorted(experts, key=lambda e: -z[e])[:top_k]
        best_biased = sorted(experts, key=lambda e: -biased[e])[:top_k]
        flip += best[0] != best_biased[0]
        flip_set += 1 - len(set(best) & set(best_biased)) / top_k
        mean = sum(z) / len(z)
        variance += sum((v - mean) ** 2 for v in z) / (len(z) - 1)
        mean_q = [m + b / len(rows) for m, b in zip(mean_q, q)]
    n = len(rows)
    entropy = -sum(m * math.log(m) for m in mean_q if m > 0)
    return {
        "js": js / n,
        "overlap": overlap / n,
        "flip": flip / n,
        "flip_set": flip_set / n,
        "neff": math.exp(entropy),
        "saturation": max(mean_q),
        "logit_std": math.sqrt(variance / n),
    }


def expert_mlp(x: Tensor, weights: dict[str, Tensor], e: int) -> Tensor:
    """Expert e of nanoMoE's MLPExperts on rows x [n, D]."""
    h = x @ weights["c_fc"][e]
    if "fc_bias" in weights:
        h = h + weights["fc_bias"][e, 0]
    y = F.gelu(h) @ weights["c_proj"][e]
    return y + weights["proj_bias"][e, 0] if "proj_bias" in weights else y


def moe_layer(x: Tensor, experts: Tensor, gates: Tensor, weights: dict[str, Tensor], capacity: int | None = None):
    """Mixture output [N, D] for tokens x [N, D], given choice and gates [N, K], and what each expert did.

    Also returned: y [N, K, D], the output of each choice, and kept [N, K] bool. Capacity fills first choices first.
    """
    (N, K), E = experts.shape, len(weights["c_fc"])
    used = [0] * E
    kept = torch.zeros(N, K, dtype=torch.bool)
    for k in range(K):
        for n in range(N):
            e = int(experts[n, k])
            kept[n, k] = capacity is None or used[e] < capacity
            used[e] += bool(kept[n, k])
    y = torch.stack([torch.stack([expert_mlp(x[n : n + 1], weights, int(e))[0] for e in experts[n]]) for n in range(N)])
    out = (y * (gates * kept).unsqueeze(-1)).sum(1)
    return out, y, kept


def phi(y: Tensor, experts: Tensor, gates: Tensor, kept: Tensor, num_experts: int, leave_one_out: bool) -> list[float]:
    """Coherence of each expert, from the mean outputs of its tokens; nan for an expert without tokens."""
    N, K, D = y.shape
    values = []
    for e in range(num_experts):
        total, count, mixture = torch.zeros(D, dtype=y.dtype), 0, torch.zeros(D, dtype=y.dtype)
        for n in range(N):
            for k in range(K):
                if not kept[n, k]:
                    continue
                own = int(experts[n, k]) == e
                if own:
                    total = total + y[n, k]
                    count += 1
                if not (own and leave_one_out):
                    mixture = mixture + gates[n, k] * y[n, k] / N
        if count == 0:
            values.append(math.nan)
            continue
        mean = total / count
        values.append((mean @ mixture / (mean.norm() * mixture.norm())).item())
    return values
