"""Slow versions to compare with: loops over tokens and experts, written from the equations, sharing no code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax(values: list[float]) -> list[float]:
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def js_divergence(p: list[float], q: list[float]) -> float:
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    m = [(x + y) / 2 for x, y in zip(p, q)]
    return (kl(p, m) + kl(q, m)) / 2


def overlap(p: list[float], q: list[float]) -> float:
    return sum(max(0.0, b - a) for a, b in zip(p, q))


def set_change(p: list[float], q: list[float], k: int) -> float:
    """Share of the k largest of p that are not among the k largest of q."""
    best = [set(sorted(range(len(v)), key=lambda e: -v[e])[:k]) for v in (p, q)]
    return 1 - len(best[0] & best[1]) / k


def mean_std(values: list[float], correction: int = 0) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - correction))


def routing_statistics(z_clean: Tensor, bias: Tensor, top_k: int) -> dict[str, float]:
    """Means over tokens for clean logits [N, E] and the applied bias [E], by the names of the metrics."""
    rows, offsets = z_clean.double().tolist(), bias.double().tolist()
    biased = [[z + b for z, b in zip(row, offsets)] for row in rows]
    p, q = ([softmax(row) for row in logits] for logits in (rows, biased))

    def mean(values):
        return sum(values) / len(rows)

    mean_q = [mean(column) for column in zip(*q)]
    return {
        "js": mean(js_divergence(*pair) for pair in zip(p, q)),
        "overlap": mean(overlap(*pair) for pair in zip(p, q)),
        "flip": mean(set_change(*pair, 1) for pair in zip(rows, biased)),
        "flip_set": mean(set_change(*pair, top_k) for pair in zip(rows, biased)),
        "neff": math.exp(-sum(m * math.log(m) for m in mean_q)),
        "saturation": max(mean_q),
        "logit_std": math.sqrt(mean(mean_std(row, correction=1)[1] ** 2 for row in rows)),
    }


def expert_mlp(x: Tensor, weights: dict[str, Tensor], e: int) -> Tensor:
    """Expert e of nanoMoE's MLPExperts on rows x [n, D]."""
    h = x @ weights["c_fc"][e]
    if "fc_bias" in weights:
        h = h + weights["fc_bias"][e, 0]
    y = F.gelu(h) @ weights["c_proj"][e]
    return y + weights["proj_bias"][e, 0] if "proj_bias" in weights else y


def moe_layer(x: Tensor, experts: Tensor, gates: Tensor, weights: dict[str, Tensor], capacity: int | None = None):
    """Mixture output [N, D] for tokens x [N, D], given choice and gates [N, K].

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
    return (y * (gates * kept).unsqueeze(-1)).sum(1), y, kept


def phi(y: Tensor, experts: Tensor, gates: Tensor, kept: Tensor, num_experts: int, leave_one_out: bool) -> list[float]:
    """Coherence of each expert, from the mean outputs of its tokens; nan for an expert without tokens."""
    N, K, D = y.shape
    values = []
    for e in range(num_experts):
        total, count, mixture = torch.zeros(D, dtype=y.dtype), 0, torch.zeros(D, dtype=y.dtype)
        for n in range(N):
            for k in range(K):
                own = int(experts[n, k]) == e
                if kept[n, k] and own:
                    total, count = total + y[n, k], count + 1
                if kept[n, k] and not (own and leave_one_out):
                    mixture = mixture + gates[n, k] * y[n, k] / N
        mean = total / max(count, 1)
        values.append((mean @ mixture / (mean.norm() * mixture.norm())).item() if count else math.nan)
    return values


class SlowLoop:
    """Steps 1 to 4 of one layer for signal `coherence`, `shuffled` or `load`, in plain Python.

    follows: the expert whose coherence each expert gets, with signal `shuffled`.
    """

    def __init__(self, config, follows: list[int]):
        self.config = config
        self.experts = range(len(follows))
        self.source = follows if config.signal == "shuffled" else list(self.experts)
        self.alpha = {"fast": config.alpha_fast, "mid": config.alpha_mid, "slow": config.alpha_slow}
        self.ema = {clock: [0.0 for _ in follows] for clock in self.alpha}
        self.updates, self.tokens, self.beta = ([0 for _ in follows] for _ in range(3))
        self.last = [-1 for _ in follows]
        self.step, self.logit_std, self.disagreement = 0, None, 0.0

    def phi(self, clock: str) -> list[float]:
        if not self.config.ema_debias:
            return self.ema[clock]
        return [x / (1 - self.alpha[clock] ** max(n, 1)) for x, n in zip(self.ema[clock], self.updates)]

    def layer_phi(self) -> float:
        return sum(p * n for p, n in zip(self.phi("slow"), self.tokens)) / max(sum(self.tokens), 1)

    def observed(self) -> list[bool]:
        return [last >= 0 and self.step - last < self.config.window for last in self.last]

    def relevance(self) -> float:
        threshold = self.config.bridge_threshold
        return min(1.0, max(0.0, (3 * threshold - self.disagreement) / (2 * threshold)))

    def state(self) -> dict[str, float | list]:
        found = {f"phi_{clock}": self.phi(clock) for clock in self.alpha}
        found |= {"update_count": self.updates, "total_tokens_seen": self.tokens, "last_update_step": self.last}
        found |= {"observed": self.observed(), "layer_phi": self.layer_phi(), "beta": self.beta}
        found |= {"logit_std": 1.0 if self.logit_std is None else self.logit_std}
        return found | {"disagreement": self.disagreement, "relevance": self.relevance()}

    def update(self, phi, kept, routed, logit_std: float, disagreement: float, ok: bool) -> None:
        self.step += 1
        if not ok:
            return
        alpha = 0.0 if self.logit_std is None else self.config.logit_std_alpha
        self.logit_std = logit_std if alpha == 0 else alpha * self.logit_std + (1 - alpha) * logit_std
        self.disagreement = disagreement
        for e in self.experts:
            if kept[e] > 0 and math.isfinite(phi[e]):
                for clock, a in self.alpha.items():
                    self.ema[clock][e] = a * self.ema[clock][e] + (1 - a) * phi[e]
                self.updates[e] += 1
                self.tokens[e] += kept[e]
                self.last[e] = self.step
        k_max = self.config.k_max
        self.beta = [max(-k_max, min(k_max, b + d)) for b, d in zip(self.beta, self.drift(routed))]

    def drift(self, routed) -> list[float]:
        c, mean_load = self.config, sum(routed) / len(routed)
        if c.signal == "load":
            drift = [c.eta * ((n < mean_load) - (n > mean_load)) for n in routed]
            moves = [True for _ in routed]
        else:
            moves = [self.last[e] == self.step for e in self.source]
            drift = [c.eta * (self.phi("slow")[e] - c.tau) * m for e, m in zip(self.source, moves)]
        if c.center or c.signal == "load":
            mean = sum(drift) / max(sum(moves), 1)
            drift = [(d - mean) * m for d, m in zip(drift, moves)]
        return drift
