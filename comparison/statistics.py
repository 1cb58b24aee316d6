"""Paired differences: is there an effect, is there none as large as a margin, and how many pairs would tell.

Every statement comes from one test, the sign-flip permutation test: under no effect each difference is as likely to be
its negative. Flipping the signs of a subset of the differences raises their sum where the subset's mean is negative.
So the one-sided p for a mean of at most theta is the share of the 2^n subsets whose mean is at most theta (the empty
one included), and confidence limits are order statistics of the subsets' means. The test assumes that the differences
are symmetric, and no more.
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
FEWEST_PAIRS = 6  # with n pairs no two-sided p is below 2 / 2^n: 5 pairs cannot reach 0.05
MOST_EXACT = 16  # pairs up to which all subsets are counted
SAMPLED_SUBSETS = 65536
MOST_SIMULATED = 12  # pairs up to which power is simulated, because the test is discrete; beyond, by Student's t
MOST_PAIRS = 100_000  # more are not planned


@dataclass(frozen=True)
class Contrast:
    """One arm less another, over pairs of runs with the same seed, in the outcome's unit."""

    n: int
    mean: float
    sd: float  # of one difference
    low: float  # 95% interval of the mean; infinite below FEWEST_PAIRS
    high: float
    inner_low: float  # 90% interval: it lies within the margin where both one-sided tests reject at 5%
    inner_high: float
    p: float  # of no effect, two-sided
    margin: float | None  # differences up to this do not matter; None: not declared
    p_equivalence: float | None  # of an effect as large as the margin: the larger of two one-sided p

    @property
    def enough(self) -> bool:
        """There are enough pairs for a verdict."""
        return self.n >= FEWEST_PAIRS

    @property
    def exact(self) -> bool:
        """p counts all sign patterns; else it is the share of a sample of them."""
        return self.n <= MOST_EXACT

    @property
    def found(self) -> bool:
        """An effect is claimed."""
        return self.enough and self.p <= ALPHA

    @property
    def equivalent(self) -> bool:
        """An effect as large as the margin is excluded."""
        return self.enough and self.p_equivalence is not None and self.p_equivalence <= ALPHA

    @property
    def sd_interval(self) -> tuple[float, float]:
        """95% interval of sd, for normal differences."""
        quantiles = stats.chi2.ppf([0.975, 0.025], self.n - 1)
        return tuple(self.sd * math.sqrt((self.n - 1) / q) for q in quantiles)

    @property
    def planning(self) -> tuple[float, float, float]:
        """The effect that n pairs find with probability POWER, by the spread observed, and its 95% interval."""
        if not self.enough:
            return math.inf, math.inf, math.inf
        return tuple(smallest_found(self.n) * sd for sd in (self.sd, *self.sd_interval))

    @property
    def pairs_to_decide(self) -> tuple[int | None, int | None, int | None] | None:
        """`pairs_needed` by the spread observed, and its 95% interval. None without a margin."""
        if self.margin is None:
            return None
        return tuple(pairs_needed(sd, self.margin) for sd in (self.sd, *self.sd_interval))


def contrast(differences: Sequence[float], margin: float | None = None) -> Contrast:
    """The statistics of n >= 2 paired differences. Raises ValueError for fewer, or for one that is no number."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2 or not np.isfinite(d).all():
        raise ValueError("paired differences must be two or more finite numbers")
    means = _subset_means(d[None])
    low, high = (limit.item() for limit in _limits(means, ALPHA / 2))
    inner_low, inner_high = (limit.item() for limit in _limits(means, ALPHA))
    p = min(1.0, 2 * min(_p_above(means[0], 0.0), _p_above(-means[0], 0.0)))
    equivalence = None if margin is None else max(_p_above(means[0], -margin), _p_above(-means[0], -margin))
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    return Contrast(len(d), mean, sd, low, high, inner_low, inner_high, p, margin, equivalence)


def _p_above(means: np.ndarray, theta: float) -> float:
    """One-sided p of a mean of at most theta, against a larger one, from the means [S] of the subsets."""
    tolerance = 1e-12 * np.abs(means).max()  # rounding must not part means that are equal
    return float((1 + (means <= theta + tolerance).sum()) / (1 + len(means)))


def _limits(means: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits [R] each of which the mean lies beyond with a probability of at most alpha, from subset means [R, S]."""
    k = math.floor(alpha * (means.shape[1] + 1) + 1e-9)
    if k == 0:
        return np.full(len(means), -math.inf), np.full(len(means), math.inf)
    ordered = np.partition(means, [k - 1, means.shape[1] - k], axis=1)
    return ordered[:, k - 1], ordered[:, -k]


def _subset_means(rows: np.ndarray) -> np.ndarray:
    """Means [R, S] of the non-empty subsets of each row of differences [R, n]; of a sample of them for a large n."""
    subsets = _subsets(rows.shape[1])
    return rows @ subsets.T / subsets.sum(1)


@functools.cache
def _subsets(n: int) -> np.ndarray:
    if n <= MOST_EXACT:
        return (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, (SAMPLED_SUBSETS - 1, n))
    return np.maximum(drawn, ~drawn.any(1)[:, None]).astype(np.float64)  # no empty one


@functools.cache
def _simulated_limits(n: int) -> tuple[np.ndarray, ...]:
    """95% and 90% limits of studies of n standard normal differences; an effect shifts them."""
    means = _subset_means(np.random.default_rng(n).standard_normal((4000, n)))
    return *_limits(means, ALPHA / 2), *_limits(means, ALPHA)


def power_to_find(n: int, effect: float) -> float:
    """Probability that n pairs find an effect, in standard deviations of a difference."""
    if n < FEWEST_PAIRS:
        return 0.0
    if n <= MOST_SIMULATED:
        low, high, *_ = _simulated_limits(n)
        return float(((low + effect > 0) | (high + effect < 0)).mean())
    critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
    shift = effect * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))


def power_to_exclude(n: int, margin: float, effect: float = 0.0) -> float:
    """Probability that n pairs exclude effects as large as the margin; both in standard deviations of a difference."""
    if n < FEWEST_PAIRS:
        return 0.0
    if n <= MOST_SIMULATED:
        *_, low, high = _simulated_limits(n)
        return float(((low + effect > -margin) & (high + effect < margin)).mean())
    room = math.sqrt(n) * margin - stats.t.ppf(1 - ALPHA, n - 1) * _observed_sds(n)
    shift = math.sqrt(n) * effect
    inside = stats.norm.cdf(room - shift) - stats.norm.cdf(-room - shift)
    return float(np.where(room > 0, inside, 0.0).mean())


@functools.cache
def _observed_sds(n: int) -> np.ndarray:
    """Quantiles, equally likely, of the standard deviation that n standard normal differences show."""
    return np.sqrt(stats.chi2.ppf((np.arange(500) + 0.5) / 500, n - 1) / (n - 1))


@functools.cache
def smallest_found(n: int) -> float:
    """The effect, in standard deviations of a difference, that n >= FEWEST_PAIRS pairs find with probability POWER."""
    low, high = 0.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if power_to_find(n, middle) < POWER else (low, middle)
    return high


def pairs_needed(sd: float, margin: float, effect: float | None = None) -> int | None:
    """Pairs that decide with probability POWER about a margin; None if MOST_PAIRS do not.

    Without `effect`: they exclude the margin if there is no effect, and find an effect as large as the margin. With it:
    they do one of the two if that is the true effect. sd: of a difference.
    """
    ratio = margin / sd if sd > 0 else math.inf

    def decides(n: int) -> bool:
        if effect is None:
            return min(power_to_exclude(n, ratio), power_to_find(n, ratio)) >= POWER
        true = abs(effect) / sd if sd > 0 else math.inf
        return max(power_to_exclude(n, ratio, true), power_to_find(n, true)) >= POWER

    for n in range(FEWEST_PAIRS, MOST_SIMULATED + 1):
        if decides(n):
            return n
    low, high = MOST_SIMULATED, MOST_PAIRS
    if not decides(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high
