"""Does a criterion know worth: correlations against scipy and brute force, error rates of studies, and the words."""

import functools
import itertools
import math
import types

import numpy as np
import pytest
from scipy import stats

from auditing import agreement
from auditing.agreement import area_under_roc, is_cheap, partial_rank_correlation, rank_correlation, verdict
from auditing.measure import Measured, reliability, standard_error
from auditing.results import AuditedRun, Group

RUNS, LAYERS, EXPERTS = 8, 2, 8


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def measured(worth, scores, decisions=(), noise=0.0, seed=0):
    """The measurements of a run with this worth [L, E] and these scores."""
    worth = np.asarray(worth, dtype=float)
    masked = worth + noise * np.array([1.0, -1.0])[:, None, None]
    run = types.SimpleNamespace(name=f"run{seed}", seed=seed, decisions=list(decisions))
    blocks = [2 * layer for layer in range(len(worth))]
    scores = {name: np.asarray(score, dtype=float) for name, score in scores.items()}
    return Measured(run, blocks, 2, np.zeros(2), masked, masked, scores)


def study(rng, runs=RUNS, shape=(LAYERS, EXPERTS), of=None):
    """Runs of random worth. of(rng, shape) returns (worth, scores); None: all are independent."""
    names = ("phi_slow", "mean_gate", "load", "reap", "random")
    of = of or (lambda rng, shape: (np.exp(rng.normal(size=shape)), {name: rng.normal(size=shape) for name in names}))
    return [measured(*of(rng, shape), seed=seed) for seed in range(runs)]


@pytest.mark.parametrize("values", [2, 4, 1000], ids=["many ties", "ties", "few ties"])
def test_rank_correlation_is_that_of_scipy(values):
    rng = np.random.default_rng(values)
    for n in (2, 3, 8, 16):
        for _ in range(50):
            a, b = rng.integers(0, values, (2, n)).astype(float)
            if len(set(a)) > 1 and len(set(b)) > 1:
                assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
            else:
                assert math.isnan(rank_correlation(a, b))
    assert rank_correlation(a, 3 * a**3) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)


def test_partial_rank_correlation_is_that_of_the_inverse_of_the_correlation_matrix():
    rng = np.random.default_rng(0)
    for n, values in itertools.product((6, 8, 16), (4, 1000)):
        for _ in range(20):
            a, b, *controls = data = rng.integers(0, values, (4, n)).astype(float)
            matrix = stats.spearmanr(np.array(data), axis=1).statistic
            if np.isfinite(matrix).all() and np.linalg.cond(matrix) < 1e6:
                inverse = np.linalg.inv(matrix)
                expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
                assert partial_rank_correlation(a, b, controls) == pytest.approx(expected, abs=1e-8)


def test_partial_rank_correlation_is_undefined_where_nothing_is_left():
    rng = np.random.default_rng(0)
    a, b, c, d = rng.normal(size=(4, 8))
    for left in (c, -c, d**3, np.ones(8)):
        assert math.isnan(partial_rank_correlation(left, b, [c, d]))
        assert math.isnan(partial_rank_correlation(b, left, [c, d]))
    assert math.isnan(partial_rank_correlation(a[:4], b[:4], [c[:4], d[:4]]))  # no degree of freedom would be left
    assert math.isfinite(partial_rank_correlation(a[:5], b[:5], [c[:5], d[:5]]))
    assert partial_rank_correlation(a, b, [c, c, np.ones(8)]) == pytest.approx(partial_rank_correlation(a, b, [c]))


def test_area_under_roc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    for n in (2, 5, 16):
        for _ in range(40):
            score, positive = rng.integers(0, 4, n), rng.random(n) < 0.4
            wins = [(p < q) + (p == q) / 2 for p in score[positive] for q in score[~positive]]
            expected = np.mean(wins) if wins else math.nan
            assert area_under_roc(score, positive) == pytest.approx(expected, nan_ok=True)


def test_roc_points_enclose_the_area():
    runs = study(np.random.default_rng(3), runs=1)
    points = agreement.roc(runs)
    x, y = ([point[key] for point in points] for key in ("others", "cheap"))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and points[-1]["threshold"] == math.inf
    area = area_under_roc(runs[0].scores["phi_slow"].ravel(), is_cheap(runs[0].worth).ravel())
    assert np.trapezoid(y, x) == pytest.approx(area)


@pytest.mark.parametrize("experts, cheap", [(2, 1), (3, 1), (7, 1), (8, 2), (16, 4)])
def test_a_quarter_of_each_layer_is_cheap_but_at_least_one(experts, cheap):
    worth = np.random.default_rng(0).normal(size=(3, experts))
    found = is_cheap(worth)
    assert found.sum(-1).tolist() == [cheap] * 3
    for layer, row in zip(worth, found):
        assert layer[row].max() <= layer[~row].min()
    assert is_cheap(np.zeros((2, experts))).all()  # all tie


def test_reliability_is_the_share_of_the_variance_that_is_not_error():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.0, (1, 400))
    for sd, batches in ((0.5, 4), (3.0, 9), (2.0, 20)):
        masked = true + rng.normal(0, sd, (batches, 1, 400))
        assert reliability(masked) == pytest.approx([1 / (1 + sd**2 / batches)], abs=0.06)
        assert standard_error(masked).mean() == pytest.approx(sd / math.sqrt(batches), rel=0.15)
    assert reliability(np.zeros((3, 2, 4))).tolist() == [0, 0] and np.isinf(standard_error(masked[:1])).all()


def shuffled(rng, shape, ties=False):
    """Worth, and scores that are worth in another order."""
    worth = np.exp(rng.normal(size=shape))
    worth = np.round(worth) if ties else worth
    return worth, {name: rng.permuted(worth, axis=-1) for name in ("phi_slow", "load", "mean_gate", "reap")}


def limit(repeats, level=0.05):
    """Three standard errors above the level."""
    return level + 3 * math.sqrt(level * (1 - level) / repeats)


@pytest.mark.parametrize("repeats, ties", [(300, False), slow(1500, False), slow(1500, True)])
def test_a_criterion_in_random_order_is_said_to_rank_experts_in_at_most_5_percent_of_studies(repeats, ties):
    rng, said = np.random.default_rng((1, ties)), []
    for _ in range(repeats):
        runs = study(rng, of=functools.partial(shuffled, ties=ties))
        said.append(verdict(agreement.agreement(runs, "phi_slow").pooled))
    better, worse = (np.mean([word in sentence for sentence in said]) for word in ("better", "worse"))
    assert better + worse <= limit(repeats) and max(better, worse) <= limit(repeats, 0.025), (better, worse)


@pytest.mark.parametrize("repeats", [slow(1500)])
def test_other_tests_of_criteria_in_random_order_have_their_level(repeats):
    rng, found = np.random.default_rng(2), []
    for _ in range(repeats):
        runs = study(rng, of=shuffled)
        rivals = agreement.against_rivals(agreement.agreements(runs))
        contrasts = agreement.roc_area(runs), agreement.added_to_router(runs), *rivals.values()
        found.append([c.is_effect for c in contrasts])
    assert np.mean(found, axis=0).max() <= limit(repeats), np.mean(found, axis=0)


def test_criteria_that_know_worth_are_found():
    def of(rng, shape):
        worth = rng.normal(size=shape)
        knows = worth + rng.normal(size=shape)
        return worth, {"phi_slow": knows, "load": -knows, "mean_gate": rng.normal(size=shape), "reap": knows}

    rng, said = np.random.default_rng(1), []
    for _ in range(20):
        runs = study(rng, of=of)
        found = agreement.agreements(runs)
        rivals = agreement.against_rivals(found)
        sentences = [found[name].sentence for name in ("phi_slow", "load")]
        said.append([*(s.split()[3] for s in sentences), rivals["load"].is_effect, rivals["reap"].p == 1.0])
    assert said.count(["better", "worse", True, True]) >= 18
    group = Group("on", [AuditedRun(run, None, [], [], []) for run in runs])
    assert group.sentences[0].startswith("phi_slow ranks experts better than chance (mean rank correlation +0.")
    assert any(s.startswith("phi_slow against load: phi_slow ranks better (mean difference") for s in group.sentences)
    assert any(s.startswith("phi_slow against reap: no difference is shown") for s in group.sentences)


def added(rng, repeats, of):
    """Share of studies in which phi_slow is said to add to what the router knows, in either direction."""
    found = [agreement.added_to_router(study(rng, of=of)) for _ in range(repeats)]
    return np.mean([c is not None and c.is_effect for c in found])


@pytest.mark.parametrize("repeats", [100, slow(1500)])
def test_phi_that_follows_the_router_adds_nothing_to_it_where_worth_does_not_follow_it(repeats):
    def of(rng, shape):
        gate, load = rng.normal(size=(2, *shape))
        return rng.normal(size=shape), {"phi_slow": gate + load, "mean_gate": gate, "load": load + gate}

    assert added(np.random.default_rng(0), repeats, of) <= limit(repeats)


def test_ranks_do_not_hold_all_that_the_router_knows():
    """Where worth and phi both follow gate and load, phi is said to add to them: a limit of partial correlation."""

    def of(rng, shape):
        gate, load = np.exp(rng.normal(size=(2, *shape)))
        worth, phi = (gate * load * np.exp(0.3 * rng.normal(size=shape)) for _ in range(2))
        return worth, {"phi_slow": phi, "mean_gate": gate, "load": load}

    assert added(np.random.default_rng(0), 40, of) > 0.3


CONSTANT = {"phi_slow": np.ones((LAYERS, EXPERTS)), "mean_gate": np.ones((LAYERS, EXPERTS))}


def test_runs_and_layers_where_a_correlation_is_undefined_are_left_out():
    rng = np.random.default_rng(0)
    runs = study(rng)
    runs[0].scores["phi_slow"][:] = 0
    runs[1].scores["phi_slow"][0] = 0
    runs[2].masked[:] = 0
    found = agreement.agreement(runs, "phi_slow")
    assert np.isnan(found.by_layer).tolist() == [[True] * 2, [True, False], [True] * 2, *[[False] * 2] * 5]
    assert np.isnan(found.per_run[[0, 2]]).all() and found.per_run[1] == found.by_layer[1, 1]
    assert found.pooled.n == 6 and found.pooled.mean == pytest.approx(np.nanmean(found.per_run))
    assert agreement.added_to_router(runs).n == 6
    assert agreement.against_rivals(agreement.agreements(runs))["load"].n == 6


@pytest.mark.parametrize("runs, defined", [(1, 1), (8, 0), (8, 1), (8, 4), (5, 5)])
def test_a_sentence_on_too_few_runs_does_not_misstate_their_number(runs, defined):
    found = study(np.random.default_rng(0), runs=runs)
    for run in found[defined:]:
        run.scores["phi_slow"][:] = 1
    said = agreement.agreement(found, "phi_slow").sentence
    ending = f", and its rank correlation is defined in {defined}" if defined > 1 else ""
    assert said == f"phi_slow is not tested: a verdict needs 6 runs{ending}"


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 2), (1, 4), (3, 16)], ids=str)
@pytest.mark.parametrize("runs", [1, 2, 7])
def test_every_number_of_experts_layers_and_runs_has_sentences(runs, shape):
    rng = np.random.default_rng(1)
    for kind in ("random", "constant", "idle"):
        found = study(rng, runs=runs, shape=shape)
        for run in found:
            for score in run.scores.values():
                score[..., 0 if kind == "idle" else slice(0)] = 0
                score *= kind != "constant"
            run.masked[..., 0 if kind == "idle" else slice(0)] = 0
        group = Group("on", [AuditedRun(run, None, [], [], []) for run in found])
        text = "\n".join(group.sentences)
        assert (
            ("phi_slow" in text or "none is defined" in text)
            and "nan" not in text
            and "inf" not in text.replace("infinite", "")
        ), text
        assert len(group.roc) >= 2 and all(math.isfinite(point["cheap"]) for point in group.roc)


def decision(expert, action="open", reason="unused", step=5):
    return {"expert_id": expert, "reason": reason, "action": action, "step": step}


def test_proposals_state_what_a_prune_costs():
    worth = np.array([[0.3, 0.1, -0.02, 0.2], [0.0, 0.4, 0.5, 0.6]])
    decisions = [decision(e) for e in ("L0_E0", "L0_E2", "L2_E1", "L1_E0", "L0_E4", "router")]
    decisions += [decision("L2_E1", "withdrawn", step=9)]
    found = agreement.proposals(measured(worth, {}, decisions, noise=0.01))
    assert [(p.expert, p.is_open, p.step, p.worth_less) for p in found] == [
        ("L0_E0", True, 5, 3),
        ("L0_E2", True, 5, 0),
        ("L2_E1", False, 9, 1),
    ]
    assert [p.sentence for p in found] == [
        "pruning L0_E0 costs 0.300 ± 0.010 nats; three of the three others are worth less",
        "pruning L0_E2 gains 0.020 ± 0.010 nats; none of the three others are worth less",
        "pruning L2_E1 costs 0.400 ± 0.010 nats; one of the three others is worth less",
    ]


@pytest.mark.parametrize(
    "worth, ending", [([0.1, 0.2], "the other is not worth less"), ([0.3, 0.2], "the other is worth less")]
)
def test_a_proposal_in_a_layer_of_two_experts_has_a_sentence(worth, ending):
    (found,) = agreement.proposals(measured([worth], {}, [decision("L0_E0")]))
    assert found.sentence.endswith(f"; {ending}")
