"""Experts that had no token, and the section of compare.py's report on audited runs."""

import numpy as np
import pytest

from auditing import compared
from auditing.agreement import agreement
from auditing.results import Group
from tests.auditing.test_report import PROPOSAL, make_audited


def with_unused(seed):
    """An audited run in which only the experts without tokens tie phi_slow to worth."""
    run = make_audited(seed, experts=8)
    rng, m = np.random.default_rng(seed), run.measured
    m.masked[:, :, :4] = 0.0
    m.scores["load"][:] = np.where(np.arange(8) < 4, 0.0, 5.0)
    m.scores["phi_slow"][:] = np.where(np.arange(8) < 4, 0.0, rng.random((2, 8)) + 1)
    return run


def test_the_agreement_without_unused_experts_is_that_of_the_others():
    group = Group("on", [with_unused(seed) for seed in range(8)])
    assert group.agreements["phi_slow"].pooled.mean > 0.6 and group.unused == 8 * 2 * 4
    used = agreement(group.measured, "phi_slow", used=True)
    cut = []
    for m in group.measured:
        worth, phi = m.worth[:, 4:], m.scores["phi_slow"][:, 4:]
        ranks = [np.argsort(np.argsort(x, axis=1), axis=1) for x in (worth, phi)]
        cut.append(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks)]))
    assert used.per_run == pytest.approx(np.array(cut))
    (sentence,) = [s for s in group.sentences if s.startswith("Without the 64 of 128 experts")]
    assert f"{used.pooled.mean:+.2f}" in sentence


def test_a_run_in_which_at_most_one_expert_has_tokens_has_no_correlation_of_used_experts():
    run = with_unused(0)
    run.measured.scores["load"][:] = np.eye(8)[0]
    assert np.isnan(agreement([run.measured], "phi_slow", used=True).by_layer).all()


def test_compare_shows_the_runs_that_have_been_audited(monkeypatch):
    found = {f"out/on_seed{seed}": make_audited(seed, decisions=[PROPOSAL] * (seed == 1)) for seed in range(7)}
    arms = {"on": {seed: run.measured.run for seed, run in enumerate(found.values())}}
    arms["off"] = {0: make_audited(0, name="not audited").measured.run}
    monkeypatch.setattr(compared, "from_cache", lambda run: found[run.name].measured if run.name in found else None)
    (row,) = compared.table(arms).rows
    cells = dict(zip(compared.table(arms).columns, row))
    pooled = agreement([run.measured for run in found.values()], "phi_slow").pooled
    assert cells["arm"] == "on" and cells["audited runs"] == "7"
    assert cells["phi_slow and worth"] == f"{pooled.mean:+.2f} ({pooled.low:+.2f} to {pooled.high:+.2f})"
    cost = found["out/on_seed1"].measured.worth[0, 2]  # of L1_E2
    assert cells["open proposals and their cost"] == f"1, mean {cost:+.4f} nats"
    assert compared.table({"off": arms["off"]}) is None
