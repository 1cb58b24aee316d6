"""The comparison's statistics: against brute force, and calibrated by studies simulated through the report's code."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from comparison.analysis import SECOND, analyse, conclusion, no_verdict, verdict
from comparison.report import Comparison, as_markdown
from comparison.runs import Run
from comparison.statistics import (
    ALPHA,
    FEWEST_PAIRS,
    POWER,
    contrast,
    pairs_needed,
    power_to_exclude,
    power_to_find,
    smallest_found,
)
from trainer.arms import ARMS
from trainer.settings import Settings

START = {"step": 0, "code_sha256": "c", "matmul_precision": "highest"}
SD = 0.02  # of one run's loss about its seed's; a difference has SD * sqrt(2)
CLAIM = re.compile(r"\b(lowers|raises)\b|An effect|loss is (lower|higher)")
EQUIVALENCE = re.compile(r"no effect on the validation loss larger|No effect larger|same loss within")


def one_sided(d, theta):
    """p of a mean of at most theta, by all sign patterns of d - theta."""
    shifted = [x - theta for x in d]
    sums = [sum(s * x for s, x in zip(signs, shifted)) for signs in itertools.product((1, -1), repeat=len(d))]
    return sum(s >= sum(shifted) - 1e-12 for s in sums) / len(sums)


@pytest.mark.parametrize("n", [2, 5, 6, 9])
def test_p_values_count_all_sign_patterns(n):
    d = list(np.random.default_rng(n).normal(0.3, 1, n))
    c = contrast(d, margin=0.7)
    assert c.p == pytest.approx(min(1, 2 * min(one_sided(d, 0), one_sided([-x for x in d], 0))))
    assert c.p_equivalence == pytest.approx(max(one_sided(d, -0.7), one_sided([-x for x in d], -0.7)))
    assert contrast([1.0] * 6).p == 2 / 64
    assert contrast([0.0] * 6).p == 1.0


def test_intervals_invert_the_tests():
    rng = np.random.default_rng(1)
    for n in (6, 8, 11, 17):
        for _ in range(40):
            d = rng.normal(rng.normal(0, 0.5), 1, n)
            margin = abs(rng.normal(0.8, 0.3))
            c = contrast(d, margin)
            assert c.found == (not c.low <= 0 <= c.high)
            assert c.equivalent == (-margin < c.inner_low and c.inner_high < margin)
            just_out = (c.low - 1e-9, c.high + 1e-9)
            assert all(contrast(d - theta).p <= ALPHA for theta in just_out)
            just_in = (c.low + 1e-9, c.high - 1e-9)
            assert all(contrast(d - theta).p > ALPHA for theta in just_in)


def test_sampled_patterns_agree_with_scipys_permutation_test():
    d = np.random.default_rng(5).normal(0.4, 1, 18)
    theirs = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=40000, rng=np.random.default_rng(1)
    )
    c = contrast(d)
    assert c.p == pytest.approx(theirs.pvalue, abs=0.01)
    assert not c.exact and contrast(d[:16]).exact


def test_too_few_pairs_give_no_verdict():
    c = contrast([1.0] * (FEWEST_PAIRS - 1), margin=2.0)
    assert not c.enough and not c.found and not c.equivalent
    assert c.low == -math.inf and c.planning == (math.inf,) * 3
    assert 2 / 2 ** (FEWEST_PAIRS - 1) > 0.05 >= 2 / 2**FEWEST_PAIRS
    for bad in ([0.1], [0.1, math.nan]):
        with pytest.raises(ValueError):
            contrast(bad)


@pytest.mark.parametrize("n", [6, 9, 13, 16])
@pytest.mark.parametrize("effect", [0.0, 0.5, 1.2])
def test_power_is_what_simulated_contrasts_have(n, effect):
    studies = 1000 if n < 16 else 200
    draws = [contrast(d, 1.2) for d in np.random.default_rng(100 + n).normal(effect, 1, (studies, n))]
    tolerance = 0.02 + 3 * math.sqrt(0.25 / studies)
    assert np.mean([c.found for c in draws]) == pytest.approx(power_to_find(n, effect), abs=tolerance)
    assert np.mean([c.equivalent for c in draws]) == pytest.approx(power_to_exclude(n, 1.2, effect), abs=tolerance)


@pytest.mark.parametrize("n", [6, 8, 14, 40])
def test_the_planning_effect_has_the_planned_power(n):
    assert power_to_find(n, smallest_found(n)) == pytest.approx(POWER, abs=0.01)


def test_the_interval_of_a_planning_figure_covers_the_true_one():
    draws = [contrast(d) for d in np.random.default_rng(2).normal(0, 1, (1000, 8))]
    covered = np.mean([c.planning[1] <= smallest_found(8) <= c.planning[2] for c in draws])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_pairs_needed_decide_with_the_planned_power_and_one_less_do_not():
    for sd, margin in ((0.014, 0.02), (0.02, 0.02), (0.03, 0.01)):
        n = pairs_needed(sd, margin)
        powers = [min(power_to_exclude(k, margin / sd), power_to_find(k, margin / sd)) for k in (n - 1, n)]
        assert powers[0] < POWER + 0.02 and powers[1] >= POWER
    assert pairs_needed(0.0, 0.01) == FEWEST_PAIRS
    assert pairs_needed(1.0, 1e-9) is None


def study(rng, pairs, effects, margin=0.03, spread=SD, arms=("off", "on", "shuffled", "load")):
    """Runs of a whole study in memory, their losses `effects[arm]` apart. Every metric that a report reads is drawn."""
    made = {}
    for arm in arms:
        settings = ARMS[arm] | {"arm": arm, "margin": margin, "max_iters": 40, "eval_interval": 10}
        made[arm] = {}
        for seed in range(pairs):
            config = Settings().flat() | settings | {"seed": seed, "history": [START]}
            loss = 2 + 0.1 * seed + effects.get(arm, 0.0) + rng.normal(0, spread)
            metrics = {"routing/L0/neff": rng.normal(7, 1), "routing/L0/load_cv": rng.random()}
            lines = [{"step": step, "val/loss": loss + 1 - step / 40, **metrics} for step in range(0, 41, 10)]
            made[arm][seed] = Run(f"{arm}{seed}", config, lines, [])
    return made


def said(arms):
    """All that the report says of the arms, the tables included."""
    comparison = Comparison(arms, {}, [], "command", analyse(arms), {}, [])
    page = as_markdown(comparison, [])
    return page.replace(page[page.index("## All contrasts") : page.index("| outcome")], "")  # without the fixed note


def shares(studies, **options):
    """(share of studies that claim an effect anywhere in the report, share that claims equivalence)."""
    rng = np.random.default_rng(20260101)
    texts = [said(study(rng, **options)) for _ in range(studies)]
    return np.mean([bool(CLAIM.search(t)) for t in texts]), np.mean([bool(EQUIVALENCE.search(t)) for t in texts])


def at_most(share, level, studies):
    return share <= level + 2.5 * math.sqrt(level * (1 - level) / studies)


SIZES = [300, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("studies", SIZES)
@pytest.mark.parametrize("pairs", [pytest.param(6, marks=pytest.mark.slow), 8])
def test_a_study_without_effect_claims_one_in_at_most_five_of_a_hundred(pairs, studies):
    claims, _ = shares(studies, pairs=pairs, effects={})
    assert at_most(claims, 0.05, studies)


@pytest.mark.parametrize("studies", SIZES)
@pytest.mark.parametrize("effect", [0.03, pytest.param(-0.03, marks=pytest.mark.slow)])
def test_equivalence_is_claimed_in_at_most_five_of_a_hundred_at_the_margin(effect, studies):
    _, equivalent = shares(studies, pairs=8, effects={"on": effect}, margin=0.03)
    assert at_most(equivalent, 0.05, studies)


@pytest.mark.parametrize("studies", SIZES)
def test_a_planned_study_decides_as_often_as_planned(studies):
    margin = 0.04
    n = pairs_needed(SD * math.sqrt(2), margin)
    ratio = margin / (SD * math.sqrt(2))
    noise = 2 * math.sqrt(POWER * (1 - POWER) / studies)
    claims, _ = shares(studies, pairs=n, effects={"on": margin, "shuffled": margin}, margin=margin)
    assert claims == pytest.approx(power_to_find(n, ratio), abs=0.05 if studies > 1000 else noise + 0.02)
    _, equivalent = shares(studies, pairs=n, effects={}, margin=margin)
    assert equivalent == pytest.approx(power_to_exclude(n, ratio), abs=0.05 if studies > 1000 else noise + 0.02)


def test_the_placebo_is_tested_only_after_an_effect_and_its_claims_hold_five_of_a_hundred():
    rng = np.random.default_rng(7)
    tested = wrong = 0
    for _ in range(500):
        analysis = analyse(study(rng, 8, {"on": -0.1, "shuffled": -0.1}, arms=("off", "on", "shuffled")))
        text = conclusion(analysis)
        tested += no_verdict(analysis, SECOND) is None
        wrong += "the loss is lower than with" in text or "the loss is higher than with" in text
    assert tested > 490 and at_most(wrong / 500, 0.05, 500)
    analysis = analyse(study(rng, 8, {"shuffled": 0.5}))
    assert "tested only where 'on' against 'off' finds an effect" in verdict(analysis, analysis.row(SECOND))
