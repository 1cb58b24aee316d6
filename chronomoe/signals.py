"""What can move beta (step 3). A signal is a function and a line in SIGNALS.

A signal gives the drift of beta in one step, [L, E], by one of two ways:

    from what is known:    coherence, shuffled, load, frozen
    from a score:          score -> EMA of the slow clock -> drift      leave_one_out, walk, first_order, reap, worth

Scores of other units than coherence are standardized over the experts of a layer, and multiplied by the standard
deviation of phi_slow. So they move beta as fast as the coherence does with `center`:

    drift_e = eta * std(phi_slow) * (score_e - mean(score)) / std(score)        `matched_drift`

A score is measured wherever step 2 is on, even if step 3 is off. It must not read a tensor on the host, and must be the
same on all ranks: it is computed from the reduced trace.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from chronomoe.coherence import coherence
from chronomoe.state import StateModule, debiased, update_ema
from chronomoe.trace import MoETrace

if TYPE_CHECKING:  # config.py imports SIGNALS
    from chronomoe.coherence import CoherenceBuffer
    from chronomoe.config import ChronoConfig

SMALLEST_STD = 1e-6  # of scores, relative to the largest: below it, differences are rounding


class Observation(NamedTuple):
    """What a drift may use, per layer and expert."""

    phi_slow: Tensor  # [L, E]
    updated: Tensor  # [L, E] bool: phi was updated in this step
    beta: Tensor  # [L, E]
    tokens_per_expert: Tensor  # [L, E] tokens routed in this step
    score: Tensor  # [L, E] smoothed; 0 for signals without a score
    scored: Tensor  # [L, E] bool: the expert has a score
    follows: Tensor  # [L, E] int64: another expert of the layer
    pattern: Tensor  # [L, E] constant, mean 0 and standard deviation 1 in each layer


def coherence_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """eta * (phi_slow - tau)."""
    return _centred(config.eta * (seen.phi_slow - config.tau) * seen.updated, config, seen)


def shuffled_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """The drift of coherence, with the coherence of another expert of the layer."""
    phi_slow, updated = seen.phi_slow.gather(-1, seen.follows), seen.updated.gather(-1, seen.follows)
    return coherence_drift(config, seen._replace(phi_slow=phi_slow, updated=updated))


def leave_one_out_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """The drift of coherence, with the smoothed score instead of phi_slow."""
    return coherence_drift(config, seen._replace(phi_slow=seen.score))


def load_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """Loss-free load balancing (https://arxiv.org/abs/2408.15664, algorithm 1), less its mean.

    An expert with less than its layer's mean load rises by eta, one with more falls by eta.
    """
    load = seen.tokens_per_expert
    drift = config.eta * torch.sign(load.mean(-1, keepdim=True) - load)
    return drift - drift.mean(-1, keepdim=True)


def frozen_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """Sets beta to a random pattern of standard deviation `spread` in the first step, and keeps it."""
    assert config.spread is not None  # ChronoConfig requires it
    return config.spread * seen.pattern - seen.beta


def matched_drift(config: ChronoConfig, seen: Observation) -> Tensor:
    """The smoothed score, standardized to the standard deviation that phi_slow has in the layer."""
    (mean, std), (_, std_of_phi) = (_moments(x, seen.scored) for x in (seen.score, seen.phi_slow))
    largest = (seen.score * seen.scored).abs().amax(-1, keepdim=True)
    is_varied = std > SMALLEST_STD * largest
    standardized = torch.where(is_varied & seen.scored, (seen.score - mean) / std.where(is_varied, 1), 0.0)
    return _centred(config.eta * std_of_phi * standardized * seen.updated, config, seen)


def _moments(x: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [L, 1] of x [L, E] over the experts where `of` [L, E] is True."""
    count = of.sum(-1, keepdim=True).clamp_min(1)
    mean = (x * of).sum(-1, keepdim=True) / count
    return mean, (((x - mean) * of).square().sum(-1, keepdim=True) / count).sqrt()


def _centred(drift: Tensor, config: ChronoConfig, seen: Observation) -> Tensor:
    """With `center`, the drift less its mean over the experts that it moves."""
    if not config.center:
        return drift
    mean = drift.sum(-1, keepdim=True) / seen.updated.sum(-1, keepdim=True).clamp_min(1)
    return (drift - mean) * seen.updated


def leave_one_out(state: SignalState, trace: MoETrace, config: ChronoConfig) -> Tensor:
    """cos(sum of y_e, sum of the mixture of the other experts)."""
    return coherence(trace.required("output"), trace.required("gated_output"), "leave_one_out")


def walk(state: SignalState, trace: MoETrace, config: ChronoConfig) -> Tensor:
    """A random walk towards 0: x <- a x + sqrt(1 - a^2) n, n standard normal, a = alpha_slow."""
    alpha = config.alpha_slow
    drawn = normal_numbers(state.key, state.step, state.noise.shape)
    state.noise.copy_(torch.where(state.step == 1, drawn, alpha * state.noise + (1 - alpha**2) ** 0.5 * drawn))
    return state.noise


def first_order(state: SignalState, trace: MoETrace, config: ChronoConfig) -> Tensor:
    """Sum of |g dL/dg| over the expert's tokens, from the step's backward.

    https://arxiv.org/abs/1905.10650 for heads, https://arxiv.org/abs/2404.05089 for experts.
    """
    return trace.required("first_order")


def reap(state: SignalState, trace: MoETrace, config: ChronoConfig) -> Tensor:
    """Mean of g |y| over the expert's tokens (https://arxiv.org/abs/2510.13999)."""
    return trace.required("gated_norm") / trace.required("kept_per_expert").clamp_min(1)


def worth(state: SignalState, trace: MoETrace, config: ChronoConfig) -> Tensor:
    """The rise of the loss when the expert is masked, as last measured (`ChronoLoop.set_worth`)."""
    return state.worth


class Signal(NamedTuple):
    what: str  # what beta follows, in words
    drift: Callable[[ChronoConfig, Observation], Tensor]
    score: Callable[[SignalState, MoETrace, ChronoConfig], Tensor] | None = None  # of one step, before smoothing
    needs: str = ""  # field of MoETrace that only this signal reads


SIGNALS: dict[str, Signal] = {
    "coherence": Signal("the expert's coherence", coherence_drift),
    "leave_one_out": Signal("the expert's coherence with the other experts", leave_one_out_drift, leave_one_out),
    "shuffled": Signal("another expert's coherence: a placebo", shuffled_drift),
    "load": Signal("the load, which it balances", load_drift),
    "frozen": Signal("nothing: it is a constant random pattern, a placebo", frozen_drift),
    "walk": Signal("a random walk: a placebo", matched_drift, walk),
    "first_order": Signal("the sum of |g dL/dg|", matched_drift, first_order, needs="first_order"),
    "reap": Signal("the mean of g |y|", matched_drift, reap, needs="gated_norm"),
    "worth": Signal("the measured worth: an upper bound", matched_drift, worth),
}


class SignalState(StateModule):
    """The state of the signals, for all L layers, on the device."""

    follows: Tensor  # [L, E] int64: the expert whose coherence each expert gets (signal 'shuffled')
    pattern: Tensor  # [L, E] of signal 'frozen'
    key: Tensor  # [] int64, of the random numbers of signal 'walk'
    step: Tensor  # [] int64, number of steps taken
    noise: Tensor  # [L, E] of signal 'walk'
    worth: Tensor  # [L, E] nats per token, last measured
    score_ema: Tensor  # [L, E] EMA of the score, not corrected for its start at zero
    score_count: Tensor  # [L, E] int64, number of observations

    def __init__(self, num_layers: int, num_experts: int, config: ChronoConfig, seed: int):
        super().__init__()
        self.config = config
        shape = (num_layers, num_experts)
        self.register_buffer("follows", derangement(num_layers, num_experts, seed))
        self.register_buffer("pattern", random_pattern(num_layers, num_experts, seed + 1))  # independent of `follows`
        self.register_buffer("key", torch.tensor(seed % 2**62, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        for name in ("noise", "worth", "score_ema"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("score_count", torch.zeros(shape, dtype=torch.int64))

    def forget(self) -> None:
        """Forget the score: that of another signal has other units."""
        for value in (self.step, self.noise, self.score_ema, self.score_count):
            value.zero_()

    @torch.no_grad()
    def update(self, trace: MoETrace, updated: Tensor, ok: Tensor) -> None:
        """Update the score of the experts in `updated` [L, E] bool.

        Where `ok` [] bool is False only `step` and `noise` advance.
        """
        score = SIGNALS[self.config.signal].score
        if score is None:
            return
        self.step += 1
        value = score(self, trace, self.config)
        active = ok & updated & (value.abs() < torch.inf)
        update_ema(self.score_ema, torch.where(active, value, 0.0), active, self.config.alpha_slow)
        self.score_count += active

    def score(self) -> Tensor:
        """The smoothed score, [L, E]; 0 without an observation."""
        if not self.config.ema_debias:
            return self.score_ema
        return debiased(self.score_ema, self.score_count, self.config.alpha_slow)

    def observation(self, beta: Tensor, coherence: CoherenceBuffer, phi_slow: Tensor, load: Tensor) -> Observation:
        """What a drift may use after this step's update."""
        return Observation(
            phi_slow, coherence.updated(), beta, load, self.score(), self.score_count > 0, self.follows, self.pattern
        )


def derangement(num_layers: int, num_experts: int, seed: int) -> Tensor:
    """Draw for each layer a random permutation of the experts without fixed points: [L, E] int64.

    Each is one cycle through all experts, uniform over such cycles, so every other expert is equally likely.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_layers):
        cycle = torch.randperm(num_experts, generator=generator)
        rows.append(torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1)))
    return torch.stack(rows) if rows else torch.empty(0, num_experts, dtype=torch.int64)


def random_pattern(num_layers: int, num_experts: int, seed: int) -> Tensor:
    """Equally spaced values in random order, of mean 0 and standard deviation 1 in each layer: [L, E] float32.

    Equally spaced, so that a bound of beta at twice the standard deviation cuts none.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.arange(num_experts, dtype=torch.float32) - (num_experts - 1) / 2
    values = values / values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    rows = [values[torch.randperm(num_experts, generator=generator)] for _ in range(num_layers)]
    return torch.stack(rows) if rows else torch.empty(0, num_experts)


def normal_numbers(key: Tensor, step: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers in float32, a function of `key` and `step`, [] int64 each.

    There is no generator whose state must be saved or agree over ranks. Two hashes (SplitMix64's finalizer,
    https://doi.org/10.1145/2714064.2660195) give uniform numbers, which the Box-Muller transform makes normal.
    """
    index = torch.arange(shape.numel(), device=step.device, dtype=torch.int64)
    counter = (step * shape.numel() + index) * 2
    u, v = (_uniform(_hash(_hash(key) + counter + i)) for i in range(2))
    return ((-2 * torch.log(u)).sqrt() * torch.cos(2 * torch.pi * v)).view(shape)


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64 numbers, whose products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _uniform(x: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32, from the high 23 bits of int64 numbers."""
    return (((x >> 41) & ((1 << 23) - 1)).float() + 0.5) / (1 << 23)
