"""The statistics against brute force, and their error rates over simulated studies, through the report's own code."""

import functools
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from comparison.analysis import analyse
from comparison.report import Comparison, as_markdown
from comparison.statistics import ALPHA, MIN_PAIRS, POWER, contrast, pairs_needed, power_to_detect, power_to_exclude
from tests.comparison.studies import make_run


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SD = 0.02  # of the loss of a run around that of its seed; a difference has SD * sqrt(2)
EFFECT = r"\b(lowers|raises)\b|An effect|loss is (lower|higher)"
EQUIVALENCE = "no effect on the validation loss larger|No effect larger|same loss within"


def one_sided(d, theta):
    """p of "the mean is at most theta" in exact arithmetic, from all sign patterns of d - theta."""
    shifted = [Fraction(str(x)) - Fraction(str(theta)) for x in d]
    sums = [sum(s * x for s, x in zip(signs, shifted)) for signs in itertools.product((1, -1), repeat=len(d))]
    return float(Fraction(sum(s >= sum(shifted) for s in sums), len(sums)))


@pytest.mark.parametrize("decimals", [1, 6], ids=["ties", "no ties"])
@pytest.mark.parametrize("n", [2, 5, 6, 9])
def test_p_is_the_share_of_all_sign_patterns(n, decimals):
    for seed in range(5):
        d = [round(x, decimals) for x in np.random.default_rng((n, seed)).normal(0.3, 1, n).tolist()]
        c, negative = contrast(d, margin=0.7), [-x for x in d]
        assert c.p == pytest.approx(min(1, 2 * min(one_sided(d, 0), one_sided(negative, 0))))
        assert c.p_equivalence == pytest.approx(max(one_sided(d, -0.7), one_sided(negative, -0.7)))
        assert (c.mean, c.sd) == pytest.approx((np.mean(d), np.std(d, ddof=1)))
    assert contrast([1.0] * 6).p == 2 / 64 and contrast([0.0] * 6).p == 1.0


def test_intervals_contain_the_means_that_the_tests_do_not_reject():
    rng = np.random.default_rng(1)
    for n in (6, 8, 11, 17):
        for _ in range(40):
            d = rng.normal(rng.normal(0, 0.5), 1, n)
            margin = abs(rng.normal(0.8, 0.3))
            c = contrast(d, margin)
            assert c.is_effect == (not c.low <= 0 <= c.high)
            assert c.is_equivalent == (-margin < c.inner_low and c.inner_high < margin)
            assert all(contrast(d - theta).p <= ALPHA for theta in (c.low - 1e-9, c.high + 1e-9))
            assert all(contrast(d - theta).p > ALPHA for theta in (c.low + 1e-9, c.high - 1e-9))


def test_sampled_sign_patterns_agree_with_scipys_permutation_test():
    d = np.random.default_rng(5).normal(0.4, 1, 18)
    rng = np.random.default_rng(1)
    scipys = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=40000, rng=rng)
    c = contrast(d)
    assert c.p == pytest.approx(scipys.pvalue, abs=0.01)
    assert not c.is_exact and contrast(d[:16]).is_exact


def test_too_few_pairs_support_no_claim():
    c = contrast([1.0] * (MIN_PAIRS - 1), margin=2.0)
    assert not c.is_enough and not c.is_effect and not c.is_equivalent
    assert c.low == -math.inf and c.detectable == (math.inf,) * 3
    assert 2 / 2 ** (MIN_PAIRS - 1) > ALPHA >= 2 / 2**MIN_PAIRS
    for bad in ([0.1], [0.1, math.nan]):
        with pytest.raises(ValueError):
            contrast(bad)


@pytest.mark.parametrize("n", [6, 9, 13, 16])
@pytest.mark.parametrize("effect", [0.0, 0.5, 1.2])
def test_power_is_the_share_of_simulated_contrasts(n, effect):
    studies = 1000 if n < 16 else 200
    draws = [contrast(d, 1.2) for d in np.random.default_rng(100 + n).normal(effect, 1, (studies, n))]
    tolerance = 0.02 + 3 * math.sqrt(0.25 / studies)
    assert np.mean([c.is_effect for c in draws]) == pytest.approx(power_to_detect(n, effect), abs=tolerance)
    assert np.mean([c.is_equivalent for c in draws]) == pytest.approx(power_to_exclude(n, 1.2, effect), abs=tolerance)


def test_detectable_effect_has_the_planned_power_and_an_interval_that_covers_it():
    true = {}
    for n in (6, 8, 14, 40):
        c = contrast(np.random.default_rng(n).normal(0, 3, n))
        true[n] = c.detectable[0] / c.sd
        assert power_to_detect(n, true[n]) == pytest.approx(POWER, abs=0.01)
    intervals = [contrast(d).detectable[1:] for d in np.random.default_rng(2).normal(0, 1, (1000, 8))]
    assert np.mean([low <= true[8] <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_pairs_needed_have_the_planned_power_and_one_fewer_does_not():
    for sd, margin in ((0.014, 0.02), (0.02, 0.02), (0.03, 0.01)):
        n = pairs_needed(sd, margin)
        powers = [min(power_to_exclude(k, margin / sd), power_to_detect(k, margin / sd)) for k in (n - 1, n)]
        assert powers[0] < POWER + 0.02 and powers[1] >= POWER
    assert pairs_needed(0.0, 0.01) == MIN_PAIRS
    assert pairs_needed(1.0, 1e-9) is None


@functools.cache
def reports(studies, pairs, on, shuffled):
    """The reports, without the fixed note, of simulated studies in which every metric that a report uses is random."""
    rng, pages = np.random.default_rng(20260101), []
    for _ in range(studies):
        arms = {arm: {} for arm in ("off", "on", "shuffled", "load")}
        for arm, seed in itertools.product(arms, range(pairs)):
            metrics = {"routing/L0/neff": rng.normal(7, 1), "routing/L0/load_cv": rng.random()}
            shift = {"on": on, "shuffled": shuffled}.get(arm, 0.0) + rng.normal(0, SD)
            arms[arm][seed] = make_run(seed, shift, arm, metrics, margin=0.03)
        page = as_markdown(Comparison(arms, {}, [], "command", analyse(arms), {}, []), [])
        pages.append(page.replace(page[page.index("## All contrasts") : page.index("| outcome")], ""))
    return pages


CLAIMS = {  # name: (pairs, effect of `on`, effect of `shuffled`, claim, lowest and highest share of studies)
    "an effect if there is none": (8, 0.0, 0.0, EFFECT, 0, 0.05),
    "the same with six pairs": slow(6, 0.0, 0.0, EFFECT, 0, 0.05),
    "equivalence if the effect is as large as the margin": (8, 0.03, 0.0, EQUIVALENCE, 0, 0.05),
    "the same for a negative effect": slow(8, -0.03, 0.0, EQUIVALENCE, 0, 0.05),
    "an effect against a placebo that has the same": (8, -0.1, -0.1, r"loss is \w+ than with a beta", 0, 0.05),
    "a large effect": (8, -0.1, -0.1, "Beta lowers", 0.98, 1),
}


@pytest.mark.parametrize("studies", [100, slow(3000)])
@pytest.mark.parametrize(("pairs", "on", "shuffled", "claim", "low", "high"), CLAIMS.values(), ids=CLAIMS)
def test_share_of_simulated_studies_that_report(pairs, on, shuffled, claim, low, high, studies):
    share = np.mean([bool(re.search(claim, page)) for page in reports(studies, pairs, on, shuffled)])
    low_error, high_error = (2.5 * math.sqrt(p * (1 - p) / studies) for p in (low, high))
    assert low - low_error <= share <= high + high_error
