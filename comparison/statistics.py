"""Statistics of paired differences: is there an effect, is it smaller than a margin, how many pairs are needed.

All results come from one test, the sign-flip permutation test. If there is no effect, each difference is as likely to
have the opposite sign. Flipping the signs of a subset of the differences raises their sum if the mean of the subset is
negative. So the one-sided p of "the mean is at most theta" is the share of the 2^n subsets (including the empty one)
whose mean is at most theta, and confidence limits are order statistics of the means of the subsets. The test assumes
that the differences are distributed symmetrically about their mean, and nothing else.

Shapes: n pairs, S subsets, R studies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER = 0.8
MIN_PAIRS = 6  # with n pairs no two-sided p is below 2 / 2^n, so 5 pairs cannot reach 0.05
MAX_EXACT = 16  # up to this number of pairs, all subsets are enumerated
SAMPLED_SUBSETS = 65536  # beyond it, including the empty one
MAX_SIMULATED = 12  # up to this number of pairs, power is simulated, because p is discrete; beyond it, from Student's t
MAX_PAIRS = 100_000  # largest number of pairs that is planned


@dataclass(frozen=True)
class Contrast:
    """Statistics of one arm minus another, over pairs of runs with the same seed, in the outcome's unit."""

    n: int
    mean: float
    sd: float  # standard deviation of one difference
    low: float  # 95% interval of the mean; infinite with fewer than MIN_PAIRS pairs
    high: float
    inner_low: float  # 90% interval: inside the margin if both one-sided tests reject at 5%
    inner_high: float
    p: float  # two-sided, of no effect
    margin: float | None  # largest difference that does not matter; None: not declared
    p_equivalence: float | None  # larger p of the two one-sided tests of an effect as large as the margin

    @property
    def is_enough(self) -> bool:
        """Whether there are enough pairs for a verdict."""
        return self.n >= MIN_PAIRS

    @property
    def is_exact(self) -> bool:
        """Whether p counts all sign patterns, not a sample of them."""
        return self.n <= MAX_EXACT

    @property
    def is_effect(self) -> bool:
        """Whether the test finds an effect."""
        return self.is_enough and self.p <= ALPHA

    @property
    def is_equivalent(self) -> bool:
        """Whether the tests exclude an effect as large as the margin."""
        return self.is_enough and self.p_equivalence is not None and self.p_equivalence <= ALPHA

    @property
    def sd_interval(self) -> tuple[float, float]:
        """95% interval of sd, for normally distributed differences."""
        quantiles = stats.chi2.ppf([0.975, 0.025], self.n - 1)
        return tuple(self.sd * math.sqrt((self.n - 1) / q) for q in quantiles)

    @property
    def detectable(self) -> tuple[float, float, float]:
        """The effect that n pairs detect with probability POWER, given sd, and its 95% interval."""
        if not self.is_enough:
            return math.inf, math.inf, math.inf
        return tuple(detectable_effect(self.n) * sd for sd in (self.sd, *self.sd_interval))

    @property
    def pairs_to_decide(self) -> tuple[int | None, int | None, int | None] | None:
        """`pairs_needed` given sd, and its 95% interval. None without a margin."""
        if self.margin is None:
            return None
        return tuple(pairs_needed(sd, self.margin) for sd in (self.sd, *self.sd_interval))


def contrast(differences: Sequence[float], margin: float | None = None) -> Contrast:
    """The statistics of n paired differences. Raises ValueError if n < 2 or a difference is not finite."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2 or not np.isfinite(d).all():
        raise ValueError("paired differences must be two or more finite numbers")
    means = _subset_means(d[None])
    low, high = (limit.item() for limit in _limits(means, ALPHA / 2))
    inner_low, inner_high = (limit.item() for limit in _limits(means, ALPHA))
    p = min(1.0, 2 * min(_p_greater(means[0], 0.0), _p_greater(-means[0], 0.0)))
    equivalence = None if margin is None else max(_p_greater(means[0], -margin), _p_greater(-means[0], -margin))
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    return Contrast(len(d), mean, sd, low, high, inner_low, inner_high, p, margin, equivalence)


def _p_greater(means: np.ndarray, theta: float) -> float:
    """One-sided p of "the mean is at most theta", from the means [S] of the non-empty subsets."""
    tolerance = 1e-12 * np.abs(means).max()  # equal means may differ by rounding
    return float((1 + (means <= theta + tolerance).sum()) / (1 + len(means)))


def _limits(means: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper one-sided confidence limits [R] at level 1 - alpha, from subset means [R, S]."""
    k = math.floor(alpha * (means.shape[1] + 1) + 1e-9)
    if k == 0:
        return np.full(len(means), -math.inf), np.full(len(means), math.inf)
    ordered = np.partition(means, [k - 1, means.shape[1] - k], axis=1)
    return ordered[:, k - 1], ordered[:, -k]


def _subset_means(rows: np.ndarray) -> np.ndarray:
    """Means [R, S] of the non-empty subsets of differences [R, n]; for a large n, of a sample of the subsets."""
    subsets = _subsets(rows.shape[1])
    return rows @ subsets.T / subsets.sum(1)


@functools.cache
def _subsets(n: int) -> np.ndarray:
    """Non-empty subsets of n elements, as rows of 0 and 1: [S, n]."""
    if n <= MAX_EXACT:
        return (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, (SAMPLED_SUBSETS - 1, n))
    return np.maximum(drawn, ~drawn.any(1)[:, None]).astype(np.float64)  # replaces an empty subset by the full one


@functools.cache
def _simulated_limits(n: int) -> tuple[np.ndarray, ...]:
    """95% and 90% limits of simulated studies of n standard normal differences. An effect shifts the limits."""
    means = _subset_means(np.random.default_rng(n).standard_normal((4000, n)))
    return *_limits(means, ALPHA / 2), *_limits(means, ALPHA)


def power_to_detect(n: int, effect: float) -> float:
    """Probability that n pairs detect an effect, given in standard deviations of a difference."""
    if n < MIN_PAIRS:
        return 0.0
    if n <= MAX_SIMULATED:
        low, high, *_ = _simulated_limits(n)
        return float(((low + effect > 0) | (high + effect < 0)).mean())
    critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
    shift = effect * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def power_to_exclude(n: int, margin: float, effect: float = 0.0) -> float:
    """Probability that n pairs exclude effects as large as the margin. Both are in standard deviations."""
    if n < MIN_PAIRS:
        return 0.0
    if n <= MAX_SIMULATED:
        *_, low, high = _simulated_limits(n)
        return float(((low + effect > -margin) & (high + effect < margin)).mean())
    room = math.sqrt(n) * margin - stats.t.ppf(1 - ALPHA, n - 1) * _observed_sds(n)
    shift = math.sqrt(n) * effect
    inside = stats.norm.cdf(room - shift) - stats.norm.cdf(-room - shift)
    return float(np.where(room > 0, inside, 0.0).mean())


@functools.cache
def _observed_sds(n: int) -> np.ndarray:
    """500 equally likely quantiles of the standard deviation observed in n standard normal differences."""
    return np.sqrt(stats.chi2.ppf((np.arange(500) + 0.5) / 500, n - 1) / (n - 1))


@functools.cache
def detectable_effect(n: int) -> float:
    """The effect, in standard deviations, that n >= MIN_PAIRS pairs detect with probability POWER."""
    low, high = 0.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if power_to_detect(n, middle) < POWER else (low, middle)
    return high


def pairs_needed(sd: float, margin: float, effect: float | None = None) -> int | None:
    """Number of pairs that decide about a margin with probability POWER; None if it exceeds MAX_PAIRS.

    Without `effect`, they must both exclude the margin if there is no effect and detect an effect as large as the
    margin. With `effect`, they must do one of the two if this is the true effect. sd: of one difference.
    """
    ratio = margin / sd if sd > 0 else math.inf

    def decides(n: int) -> bool:
        if effect is None:
            return min(power_to_exclude(n, ratio), power_to_detect(n, ratio)) >= POWER
        true = abs(effect) / sd if sd > 0 else math.inf
        return max(power_to_exclude(n, ratio, true), power_to_detect(n, true)) >= POWER

    for n in range(MIN_PAIRS, MAX_SIMULATED + 1):
        if decides(n):
            return n
    low, high = MAX_SIMULATED, MAX_PAIRS
    if not decides(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high
