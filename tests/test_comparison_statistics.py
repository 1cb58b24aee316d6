"""The comparison's statistics claim what they should: calibrated by simulation with a known spread."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from comparison.statistics import FEWEST_PAIRS, contrast, holm, sign_flip_p, smallest_found


def test_sign_flip_p_counts_all_patterns():
    d = [0.3, -0.1, 0.25, 0.6, 0.05]
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=5)]
    expected = sum(s >= abs(sum(d)) - 1e-12 for s in sums) / 32
    assert sign_flip_p(d) == pytest.approx(expected)
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert sign_flip_p([0.0] * 6) == 1.0


def test_sampled_patterns_agree_with_scipys_permutation_test():
    d = np.random.default_rng(5).normal(0.4, 1, 18)
    theirs = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=40000, rng=np.random.default_rng(1)
    )
    assert sign_flip_p(d) == pytest.approx(theirs.pvalue, abs=0.01)


@pytest.mark.parametrize("n", [6, 8, 14])
def test_no_effect_is_claimed_in_at_most_five_of_a_hundred_studies(n):
    draws = np.random.default_rng(n).normal(0, 0.02, (2000, n))
    claims = sum(contrast(d).found for d in draws) / len(draws)
    assert claims <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(draws))
    covered = sum(c.low <= 0 <= c.high for c in map(contrast, draws)) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("n", [6, 8, 14])
def test_an_effect_of_the_smallest_size_is_found_four_times_in_five(n):
    effect = 0.02 * smallest_found(n)
    draws = np.random.default_rng(100 + n).normal(effect, 0.02, (2000, n))
    assert sum(contrast(d).found for d in draws) / len(draws) == pytest.approx(0.8, abs=0.04)


def test_too_few_pairs_give_no_verdict():
    c = contrast([1.0] * (FEWEST_PAIRS - 1))
    assert not c.enough and not c.found and c.smallest_found == math.inf
    assert 2 / 2 ** (FEWEST_PAIRS - 1) > 0.05 >= 2 / 2**FEWEST_PAIRS
    for bad in ([0.1], [0.1, math.nan]):
        with pytest.raises(ValueError):
            contrast(bad)


def test_holm_is_the_step_down_method():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    families = np.random.default_rng(3).random((4000, 4))
    assert np.mean([min(holm(f)) <= 0.05 for f in families]) <= 0.06
