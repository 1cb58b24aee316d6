"""Slow versions to compare with: loops over tokens and experts, written from the equations, sharing no code."""

from __future__ import annotations

import math
from statistics import fmean, pstdev, variance

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


def routing_statistics(z_clean: Tensor, bias: Tensor, top_k: int) -> dict[str, float]:
    """Means over tokens for clean logits [N, E] and the applied bias [E], by the names of the metrics."""
    rows, offsets = z_clean.double().tolist(), bias.double().tolist()
    biased = [[z + b for z, b in zip(row, offsets)] for row in rows]
    p, q = ([softmax(row) for row in logits] for logits in (rows, biased))
    mean_q = [fmean(column) for column in zip(*q)]
    return {
        "js": fmean(js_divergence(*pair) for pair in zip(p, q)),
        "overlap": fmean(overlap(*pair) for pair in zip(p, q)),
        "flip": fmean(set_change(*pair, 1) for pair in zip(rows, biased)),
        "flip_set": fmean(set_change(*pair, top_k) for pair in zip(rows, biased)),
        "neff": math.exp(-sum(m * math.log(m) for m in mean_q)),
        "saturation": max(mean_q),
        "logit_std": math.sqrt(fmean(variance(row) for row in rows)),
    }


def moe_layer(x: Tensor, experts: Tensor, gates: Tensor, weights: dict[str, Tensor], capacity: int | None = None):
    """Mixture output [N, D] for tokens x [N, D], given choice and gates [N, K].

    Also returned: y [N, K, D], the output of each choice, and kept [N, K] bool. Capacity fills first choices first.
    """
    (N, K), used = experts.shape, [0 for _ in weights["c_fc"]]
    y, kept = x.new_zeros(N, K, x.shape[-1]), torch.zeros(N, K, dtype=torch.bool)
    for k in range(K):
        for n in range(N):
            e = int(experts[n, k])
            h = x[n] @ weights["c_fc"][e] + (weights["fc_bias"][e, 0] if "fc_bias" in weights else 0)
            y[n, k] = F.gelu(h) @ weights["c_proj"][e] + (weights["proj_bias"][e, 0] if "proj_bias" in weights else 0)
            kept[n, k] = capacity is None or used[e] < capacity
            used[e] += bool(kept[n, k])
    return (y * (gates * kept).unsqueeze(-1)).sum(1), y, kept


def phi(y: Tensor, experts: Tensor, gates: Tensor, kept: Tensor, num_experts: int, leave_one_out: bool) -> list[float]:
    """Coherence of each expert, from the mean outputs of its tokens; nan for an expert without tokens."""
    values = []
    for e in range(num_experts):
        own, mixture = [], torch.zeros_like(y[0, 0])
        for n, k in kept.nonzero().tolist():
            is_own = int(experts[n, k]) == e
            own += [y[n, k]] * is_own
            if not (is_own and leave_one_out):
                mixture = mixture + gates[n, k] * y[n, k] / len(y)
        mean = sum(own) / len(own) if own else torch.full_like(mixture, math.nan)
        values.append((mean @ mixture / (mean.norm() * mixture.norm())).item())
    return values


class SlowLoop:
    """Steps 1 to 4 of one layer, in plain Python. follows: the expert whose coherence each gets, if 'shuffled'."""

    def __init__(self, config, follows: list[int]):
        E = len(follows)
        self.config = config
        self.source = follows if config.signal == "shuffled" else list(range(E))
        self.alpha = {"fast": config.alpha_fast, "mid": config.alpha_mid, "slow": config.alpha_slow}
        self.ema = {clock: [0.0] * E for clock in self.alpha}
        self.updates, self.tokens, self.last, self.beta = [0] * E, [0] * E, [-1] * E, [0.0] * E
        self.step, self.logit_std, self.disagreement = 0, None, 0.0

    def phi(self, clock: str) -> list[float]:
        if not self.config.ema_debias:
            return self.ema[clock]
        return [x / (1 - self.alpha[clock] ** max(n, 1)) for x, n in zip(self.ema[clock], self.updates)]

    def state(self) -> dict[str, float | list]:
        """By the names of the loop's buffers and methods."""
        threshold, weighted = self.config.bridge_threshold, zip(self.phi("slow"), self.tokens)
        found = {"update_count": self.updates, "total_tokens_seen": self.tokens, "last_update_step": self.last}
        found |= {"beta_coeff": self.beta, "disagreement": self.disagreement, "logit_std": self.logit_std or 1.0}
        found["relevance"] = min(1.0, max(0.0, (3 * threshold - self.disagreement) / (2 * threshold)))
        found["observed"] = [last >= 0 and self.step - last < self.config.window for last in self.last]
        found["layer_phi"] = sum(p * n for p, n in weighted) / max(sum(self.tokens), 1)
        return found | {f"phi_{clock}": self.phi(clock) for clock in self.alpha}

    def update(self, phi, kept, routed, logit_std: float, disagreement: float, ok: bool) -> None:
        c = self.config
        self.step += 1
        if not ok:
            return
        if math.isfinite(logit_std):
            self.logit_std = c.logit_std_alpha * (self.logit_std or logit_std) + (1 - c.logit_std_alpha) * logit_std
        self.disagreement = disagreement if math.isfinite(disagreement) else self.disagreement
        for e, n in enumerate(kept):
            if n > 0 and math.isfinite(phi[e]):
                for clock, a in self.alpha.items():
                    self.ema[clock][e] = a * self.ema[clock][e] + (1 - a) * phi[e]
                self.updates[e], self.tokens[e], self.last[e] = self.updates[e] + 1, self.tokens[e] + n, self.step
        moves = [self.last[e] == self.step for e in self.source]
        drift = [c.eta * (self.phi("slow")[e] - c.tau) * m for e, m in zip(self.source, moves)]
        if c.signal == "load":
            mean = sum(routed) / len(routed)
            moves, drift = [True] * len(routed), [c.eta * ((n < mean) - (n > mean)) for n in routed]
        if c.center or c.signal == "load":
            mean = sum(drift) / max(sum(moves), 1)
            drift = [(d - mean) * m for d, m in zip(drift, moves)]
        self.beta = [max(-c.k_max, min(c.k_max, b + d)) for b, d in zip(self.beta, drift)]


class SlowSignal:
    """Step 3 of one layer for signals with a score, in plain Python."""

    def __init__(self, config):
        self.config = config
        self.ema: dict[int, float] = {}
        self.count: dict[int, int] = {}
        self.beta: list[float] = []

    def score(self) -> list[float]:
        experts, a = range(len(self.beta)), self.config.alpha_slow
        shrunk = [1 - a ** self.count.get(e, 1) if self.config.ema_debias else 1 for e in experts]
        return [self.ema.get(e, 0.0) / s for e, s in zip(experts, shrunk)]

    def update(self, raw: list[float], phi_slow: list[float], updated: list[bool], ok: bool) -> None:
        c = self.config
        self.beta = self.beta or [0.0] * len(raw)
        if not ok:
            return
        for e, value in enumerate(raw):
            if updated[e] and math.isfinite(value):
                self.ema[e] = c.alpha_slow * self.ema.get(e, 0.0) + (1 - c.alpha_slow) * value
                self.count[e] = self.count.get(e, 0) + 1
        score, known = self.score(), sorted(self.count)
        if c.signal == "leave_one_out":
            drift = [c.eta * (s - c.tau) for s in score]
        else:
            mean, spread = fmean(score[e] for e in known), pstdev([score[e] for e in known])
            speed = c.eta * pstdev([phi_slow[e] for e in known])
            drift = [speed * (s - mean) / spread if e in known and spread > 0 else 0.0 for e, s in enumerate(score)]
        drift = [d * u for d, u in zip(drift, updated)]
        if c.center:
            common = sum(drift) / max(sum(updated), 1)
            drift = [(d - common) * u for d, u in zip(drift, updated)]
        self.beta = [max(-c.k_max, min(c.k_max, b + d)) for b, d in zip(self.beta, drift)]
