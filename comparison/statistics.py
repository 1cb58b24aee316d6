"""Paired differences: how large, how sure, and what so many pairs could have found.

The test is the exact sign-flip permutation test: under no effect each difference is as likely to be its negative, so
the p-value is the share of the 2^n sign patterns whose mean is at least as far from zero. It assumes no distribution.
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
FEWEST_PAIRS = 6  # with n pairs no p is below 2 / 2^n: 5 pairs cannot reach 0.05
MOST_EXACT = 16  # pairs up to which all sign patterns are counted
SAMPLED_PATTERNS = 65536


@dataclass(frozen=True)
class Contrast:
    """One arm less another, over pairs of runs with the same seed, in the outcome's unit."""

    n: int
    mean: float
    low: float  # 95% interval of the mean, by Student's t
    high: float
    p: float  # exact sign-flip test, two-sided
    smallest_found: float  # effect that n pairs with this spread find 80% of the time

    @property
    def enough(self) -> bool:
        """There are enough pairs for a verdict."""
        return self.n >= FEWEST_PAIRS

    @property
    def found(self) -> bool:
        """An effect is claimed."""
        return self.enough and self.p <= ALPHA


def contrast(differences: Sequence[float]) -> Contrast:
    """The statistics of n >= 2 paired differences. Raises ValueError for fewer, or for one that is no number."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) < 2 or not np.isfinite(d).all():
        raise ValueError("paired differences must be two or more finite numbers")
    n, mean, sd = len(d), d.mean(), d.std(ddof=1)
    half = stats.t.ppf(1 - ALPHA / 2, n - 1) * sd / math.sqrt(n)
    smallest = sd * smallest_found(n) if n >= FEWEST_PAIRS else math.inf
    return Contrast(n, float(mean), float(mean - half), float(mean + half), sign_flip_p(d), float(smallest))


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of the sign-flip test: exact up to MOST_EXACT pairs, beyond from patterns drawn with a fixed seed."""
    return float(_sign_flip_p(np.asarray(differences, dtype=np.float64)[None, :])[0])


def _sign_flip_p(rows: np.ndarray) -> np.ndarray:
    """p of each row of differences [R, n]."""
    signs = _signs(rows.shape[1])
    flipped = np.abs(rows @ signs.T)
    observed = np.abs(rows.sum(1, keepdims=True))
    # rounding must not part patterns that are equal
    return (flipped >= observed - 1e-12 * np.abs(rows).sum(1, keepdims=True)).mean(1)


@functools.cache
def _signs(n: int) -> np.ndarray:
    if n <= MOST_EXACT:
        bits = np.arange(2**n)[:, None] >> np.arange(n)
        return 1.0 - 2.0 * (bits & 1)
    drawn = np.random.default_rng(0).integers(0, 2, (SAMPLED_PATTERNS - 1, n))
    return np.vstack([np.ones(n), 1.0 - 2.0 * drawn])  # the observed pattern is one of them


@functools.cache
def smallest_found(n: int) -> float:
    """The effect, in standard deviations of a difference, that n pairs find with probability POWER.

    By simulation with normal differences up to 12 pairs, where the test's discreteness matters; beyond by the
    noncentral t distribution, to which the test's power converges.
    """
    if n <= 12:
        draws = np.random.default_rng(n).standard_normal((4000, n))

        def power(effect: float) -> float:
            return float((_sign_flip_p(draws + effect) <= ALPHA).mean())
    else:

        def power(effect: float) -> float:
            critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
            return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n)))

    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in their order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
