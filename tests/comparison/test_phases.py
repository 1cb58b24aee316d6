"""Outcomes of runs whose text changes or whose strength of beta rises and falls, against numbers worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from comparison.analysis import (
    analyse,
    between_branches,
    conclusion,
    is_ramp,
    outcomes,
    phases,
    single_pair,
    upper_bound,
    verdict,
)
from comparison.runs import checked, group_into_arms
from comparison.tables import by_arm, provenance
from tests.comparison.studies import START, arms_of, make_run, make_study
from tests.helpers.runs import error_of

SCHEDULE = dict(data_schedule="stdlib@0 prose@40 stdlib@80", dataset="stdlib")


def shift_run(seed, arm, forgets, extra=0.0, **changes):
    """A run that forgets so many nats of code while it trains on prose."""
    run = make_run(seed, 0.0, arm, **SCHEDULE | changes)
    lines = []
    for line in run.lines:
        step = line["step"]
        code = 3 - step / 40 if step <= 40 else 2 + forgets * (step - 40) / 40 if step <= 80 else 1.9 + forgets / 90
        losses = {"val/loss": code, "val/stdlib/loss": code, "val/prose/loss": 4 - step / 100 + extra}
        lines.append(line | losses)
    return dataclasses.replace(run, lines=lines)


def test_phases_are_those_that_the_run_reached_and_equal_neighbours_are_one():
    run = make_run(0, data_schedule="stdlib@0 stdlib@10 x/prose@40 stdlib@90 prose@400")
    assert [dataclasses.astuple(p) for p in phases(run)] == [("stdlib", 0, 40), ("prose", 40, 90), ("stdlib", 90, 100)]
    at_the_end = make_run(0, data_schedule="stdlib@0 prose@100")  # of 100 steps
    assert [dataclasses.astuple(p) for p in phases(at_the_end)] == [("stdlib", 0, 100)]
    assert phases(make_run(0)) == [] and len(phases(make_run(0, data_schedule="stdlib@0"))) == 1


def test_the_outcome_of_a_shift_is_the_loss_in_the_first_text_after_the_second():
    effect = {"off": 0.8, "on": 0.5, "shuffled": 0.8}
    runs = [
        shift_run(seed, arm, forgets + 0.001 * (seed % 3), 0.1 * (arm == "on"), margin=0.1)
        for arm, forgets in effect.items()
        for seed in range(8)
    ]
    runs += [shift_run(seed, "walk", 0.7) for seed in range(8)]
    analysis = analyse(arms_of(runs))
    row = analysis.row(("on", "off"))
    # evaluations at steps 80 only: the last quarter of 40 to 80 is after 70
    assert row.outcome.name == "mean validation loss in stdlib over the last quarter of the prose phase"
    assert row.contrast.mean == pytest.approx(-0.3) and row.contrast.is_effect
    assert conclusion(analysis) == (
        "Beta lowers the loss in stdlib after training on prose, and the loss is lower than with a beta that follows "
        "another expert's coherence."
    )
    found = {(r.outcome.name, r.a): r.contrast.mean for r in analysis.described if r.b == "off"}
    assert found["mean validation loss in prose over the last quarter of its phase", "on"] == pytest.approx(0.1)
    assert found["mean validation loss in prose over the last quarter of its phase", "walk"] == pytest.approx(0)
    assert (row.outcome.name, "walk") in found
    assert by_arm(analysis.primary and arms_of(runs), analysis).rows[0][3].startswith("2.80")


def test_the_steps_until_the_loss_is_back_count_from_the_return_and_are_linear_between_evaluations():
    def run(*losses):
        lines = [{"step": 10 * i, "val/stdlib/loss": v, "val/loss": v} for i, v in enumerate(losses)]
        return dataclasses.replace(make_run(0, **SCHEDULE), lines=lines)

    found = run(5, 4, 3, 2.5, 2.0, 3, 4, 4, 4.0, 2.5, 1.5)
    others = {o.name: o for o in outcomes([found])[1]}
    steps = others["steps on stdlib until its loss is what it was before prose"]
    assert steps.of(found) == pytest.approx(15)
    assert math.isnan(steps.of(run(5, 4, 3, 2.5, 2.0, 3, 4, 4, 4.0, 2.5, 2.1)))
    assert steps.of(run(5, 4, 3, 2.5, 2.0, 3, 4, 4, 1.0, 2.5, 2.1)) == 0


def test_only_runs_that_all_change_to_the_same_texts_have_the_outcomes_of_a_shift():
    shift, plain = shift_run(0, "on", 0.5), make_run(1)
    usual = "mean validation loss of the last quarter"
    for runs in ([shift, plain], [plain, shift], [shift, shift_run(1, "on", 0.5, data_schedule="stdlib@0 prose@50")]):
        assert outcomes(runs)[0].name == usual
    names = [o.name for o in outcomes([shift])[1]]
    of_another = [o.name for o in outcomes([shift_run(0, "on", 0, data_schedule="stdlib@0 prose@40 tables@80")])[1]]
    returned = {"steps on stdlib until its loss is what it was before prose"}
    returned |= {"mean validation loss in stdlib over the last quarter of its second phase"}
    assert set(names) - set(of_another) == returned


RAMP = dict(chrono_ramp="0@0 1@50 0@100", margin=None)


def ramp_run(seed, arm, lag, **changes):
    """A run whose Neff falls with the strength of beta, and is lower by `lag` while the strength falls."""
    run = make_run(seed, 0.0, arm, **RAMP | changes)
    lines = []
    for line in run.lines:
        step = line["step"]
        strength = 1 - abs(step - 51) / 50  # that step - 1 has set
        neff = 8 - 5 * strength**2 - lag * (step > 51)
        lines.append(line | ({"routing/L0/neff": neff, "routing/L2/neff": neff} if step else {}))
    return dataclasses.replace(run, lines=lines)


@pytest.mark.parametrize("lag", [0.0, 0.7])
def test_branches_of_a_ramp_are_compared_at_equal_strengths(lag):
    run = ramp_run(0, "on", lag)
    levels = np.arange(0.1, 0.95, 0.1)
    # the line of step 0 has no Neff, so the rising branch begins at strength 0.18
    assert math.isnan(between_branches(run, "neff"))
    full = dataclasses.replace(run, lines=[run.lines[0] | {"routing/L0/neff": 8.0}, *run.lines[1:]])
    rising = [(0, 8.0), *((0.2 * i - 0.02, 8 - 5 * (0.2 * i - 0.02) ** 2) for i in range(1, 6))]
    falling = [(0.2 * i + 0.02, 8 - 5 * (0.2 * i + 0.02) ** 2 - lag) for i in range(5)] + [rising[-1]]
    up, down = (np.interp(levels, *zip(*branch)) for branch in (rising, falling))
    assert between_branches(full, "neff") == pytest.approx((down - up).mean())


def test_runs_that_are_no_ramp_have_the_usual_outcome():
    ramps = {"0@0 1@50 0@100": True, "1@0": False, "0@0 1@50": False, "": False, "0@0 1@5 0@9 1@20": False}
    ramps["0.5@0 0@5 1@10 0@20"] = False
    assert {ramp: is_ramp(make_run(0, chrono_ramp=ramp)) for ramp in ramps} == ramps
    mixed = [make_run(0, chrono_ramp="0@0 1@50 0@100"), make_run(1)]
    assert outcomes(mixed)[0].name == "mean validation loss of the last quarter"


def bounded(effect=-0.01, seeds=8, **changes):
    """The sentence on the upper bound, and the contrast that it is about. changes: settings of arm `worth`."""
    runs = [make_run(seed, 0.0, arm) for arm in ("off", "on") for seed in range(seeds)]
    runs += [make_run(seed, effect + 0.001 * seed, "worth", **changes) for seed in range(seeds)]
    analysis = analyse(arms_of(runs))
    row = next((r for r in analysis.described if r.a == "worth" and r.outcome is analysis.outcome), None)
    return upper_bound(analysis), row


def test_the_upper_bound_says_what_gain_the_interval_excludes():
    sentence, row = bounded()
    low = row.contrast.low
    assert -0.01 < low < row.contrast.mean == pytest.approx(-0.0065)
    assert "differs by -0.0065 nats from 'off'" in sentence
    assert f"the interval excludes a gain larger than {-low:.4f} nats, if" in sentence
    assert "; the interval excludes a gain, if" in bounded(0.01)[0]
    assert bounded(seeds=5)[0] is None
    assert bounded(batch_size=7)[0] is None  # the arms differ in another setting
    assert (
        upper_bound(analyse(arms_of([make_run(seed, 0.0, arm) for arm in ("off", "on") for seed in range(8)]))) is None
    )


@pytest.mark.parametrize("seeds", [1, 8])
def test_differences_of_neff_are_in_experts_and_have_neither_a_margin_nor_an_upper_bound(seeds):
    def ramp(seed, lag, arm):
        run = ramp_run(seed, arm, lag, margin=0.02)
        return dataclasses.replace(run, lines=[run.lines[0] | {"routing/L0/neff": 8.0}, *run.lines[1:]])

    runs = [
        ramp(seed, lag + 0.01 * seed, arm)
        for seed in range(seeds)
        for arm, lag in (("off", 0), ("on", 0.7), ("worth", 0.2))
    ]
    analysis = analyse(arms_of(runs))
    if seeds == 1:
        assert "experts in one pair" in single_pair(analysis, "on", "off")
    else:
        assert "experts over 8 pairs" in verdict(analysis, analysis.row(("on", "off")))
        assert analysis.row(("on", "off")).contrast.margin is None
    assert upper_bound(analysis) is None


def test_provenance_has_the_protocol_and_its_commit_at_the_start_of_each_run():
    def runs(*commits, **keys):
        starts = [[START | {"protocol_commit": commit}, START | {"protocol_commit": "later"}] for commit in commits]
        return [make_run(seed, history=history, **keys) for seed, history in enumerate(starts)]

    declared = runs("b", "a", None, "b", protocol="docs/plan.md")
    rows = dict(provenance(arms_of(declared), "", "").rows)
    assert rows["protocol"] == "docs/plan.md, at the start of the runs: a, b, not committed"
    assert "protocol" not in dict(provenance(arms_of(runs(None)), "", "").rows)


def study(effect=0.0, seeds=8, **changes):
    """Shift runs of `off` and `on`. changes: settings of `on`."""
    runs = [shift_run(seed, "off", 0.8 + 0.01 * seed) for seed in range(seeds)]
    return runs + [shift_run(seed, "on", 0.8 + 0.01 * seed + effect, **changes) for seed in range(seeds)]


def without(run, metric, at=None):
    """The run without a metric, at one step or at all."""
    lines = [{k: v for k, v in line.items() if k != metric or at not in (None, line["step"])} for line in run.lines]
    return dataclasses.replace(run, lines=lines)


def test_a_run_that_lacks_the_loss_of_a_text_cannot_be_used():
    run = shift_run(0, "on", 0.5)
    assert checked(run)
    assert "val/prose/loss of step 80 is missing" in error_of(checked, without(run, "val/prose/loss", at=80))
    assert "val/stdlib/loss of step 0 is missing" in error_of(checked, without(run, "val/stdlib/loss"))


def test_an_outcome_that_does_not_happen_in_every_run_is_not_compared():
    runs = study()
    stuck = [dataclasses.replace(r, lines=[x | {"val/stdlib/loss": 2.5} if x["step"] > 80 else x for x in r.lines])
             if r.arm == "on" and r.seed < 3 else r for r in runs]  # fmt: skip
    name = "steps on stdlib until its loss is what it was before prose"
    assert name in [r.outcome.name for r in analyse(arms_of(runs)).described]
    analysis = analyse(arms_of(stuck))
    assert name not in [r.outcome.name for r in analysis.described]
    assert any("has no value for seed 0, 1, 2, so it is not compared" in line for line in analysis.warnings)


def test_a_primary_outcome_without_a_value_has_no_verdict_and_no_number():
    runs = [ramp_run(seed, arm, 0.1) for arm in ("off", "on") for seed in range(8)]  # no Neff at low strengths
    analysis = analyse(arms_of(runs))
    assert conclusion(analysis).startswith("No verdict: the outcome has no value in a run of 'on' or 'off' (seed 0, 1")
    assert [row[3] for row in by_arm(arms_of(runs), analysis).rows] == ["-", "-"]


def test_the_outcome_is_that_of_the_tested_arms_whatever_other_runs_there_are():
    others = [make_run(seed, 0.0, "walk") for seed in range(8)]
    for runs in (study(0.3), [*study(0.3), *others]):
        analysis = analyse(arms_of(runs))
        assert analysis.outcome.name.startswith("mean validation loss in stdlib over the last quarter of the prose")
        assert analysis.row(("on", "off")).contrast.mean == pytest.approx(0.3)


def test_another_ramp_is_a_confounder_also_where_beta_is_off():
    full = [{"routing/L0/neff": 8.0}]
    runs = [ramp_run(s, "off", 0.0, chrono_ramp="0@0 1@30 0@100") for s in range(8)]
    runs += [ramp_run(s, "on", 0.0) for s in range(8)]
    runs = [dataclasses.replace(r, lines=[r.lines[0] | full[0], *r.lines[1:]]) for r in runs]
    assert 'chrono_ramp ("0@0 1@50 0@100" against "0@0 1@30 0@100")' in conclusion(analyse(arms_of(runs)))


def test_the_margin_of_a_loss_is_not_used_for_an_outcome_in_other_units():
    runs = [ramp_run(seed, arm, 0.0, margin=0.5) for arm in ("off", "on") for seed in range(8)]
    runs = [dataclasses.replace(r, lines=[r.lines[0] | {"routing/L0/neff": 8.0}, *r.lines[1:]]) for r in runs]
    row = analyse(arms_of(runs)).row(("on", "off"))
    assert row.outcome.unit == "experts" and row.contrast.margin is None


def test_arms_with_different_margins_are_compared_without_one():
    analysis = analyse(arms_of(study(0.3, margin=0.5)))
    assert analysis.row(("on", "off")).contrast.margin is None and "declare different margins" in analysis.warnings[0]
    assert conclusion(analysis).startswith("Beta raises")


def test_the_upper_bound_is_silent_if_runs_are_lost():
    runs = [make_run(seed, shift, arm) for arm, shift in (("off", 0), ("on", 0), ("worth", -0.01)) for seed in range(8)]
    assert upper_bound(analyse(arms_of(runs), {"worth": {"9"}})) is None


def test_settings_that_only_one_signal_reads_are_no_confounders():
    keys = dict(chrono_spread=0.5, worth_interval=7, worth_batches=3)
    analysis = analyse(arms_of(make_study(effect=0.0, on=keys)))
    assert not analysis.warnings and conclusion(analysis).startswith("Beta has no effect")
    frozen = [make_run(seed, 0.0, "frozen", chrono_spread=0.1 * (1 + seed // 7)) for seed in range(8)]
    assert group_into_arms([checked(run) for run in frozen])[2]  # within the arm it matters


NAMES = ["L0", "val", "train", "a\x07b", "ü", "a b", "x" * 61]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_whose_name_cannot_be_logged_is_refused(name):
    schedule = f"stdlib@0 {name}@40"
    message = error_of(checked, make_run(0, **SCHEDULE | dict(data_schedule=schedule)))
    assert "cannot be a name in the logs" in message or "must be VALUE@STEP" in message
