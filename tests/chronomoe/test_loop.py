"""The loop's state, step by step against plain Python; statistics in groups of layers and slices of tokens."""

import math

import pytest
import torch

from chronomoe import ChronoLoop, CoherenceBuffer, LifecycleCoordinator, RouterState, statistics
from chronomoe.signals import derangement
from tests.helpers import models, reference
from tests.helpers.models import Operators, assert_same, build, chrono, loop_state, tokens, trace_of


def loop_of(config, num_layers=1, num_experts=3, seed=0):
    return ChronoLoop(RouterState(num_layers, num_experts, config), list(range(0, 2 * num_layers, 2)), seed)


SIGNALS = [{}, {"center": True}, {"signal": "shuffled"}, {"signal": "shuffled", "center": True}, {"signal": "load"}]


@pytest.mark.parametrize("changes", [*SIGNALS, {"ema_debias": False}])
def test_state_follows_plain_python_through_skipped_steps_absent_experts_and_a_restart(changes):
    rates = dict(alpha_fast=0.5, alpha_mid=0.8, alpha_slow=0.95, logit_std_alpha=0.7, window=3)
    rates |= dict(prune_phi=1.0, prune_min_tokens=0, prune_min_updates=0)
    config = chrono(eta=0.1, tau=0.2, k_max=0.09375, bridge_threshold=0.2, **rates, **changes)
    L, E, was_clamped, was_weak = 2, 4, False, False
    loop = loop_of(config, L, E, seed=1)
    layers = [reference.SlowLoop(config, follows) for follows in loop.signals.follows.tolist()]
    assert loop.coherence.layer_phi().tolist() == [0, 0]
    for step in range(60):
        phi, kept = 2 * torch.rand(L, E) - 1, torch.randint(3, (L, E)) * torch.randint(2, (L, E))
        routed, std, disagreement = kept + torch.randint(3, (L, E)), 1 + torch.rand(L), torch.rand(L)
        for i, value in enumerate((phi, std, disagreement)):  # values that are not finite are not used
            if step % 8 == 5 + i:
                value.view(-1)[0] = math.nan
        found_inf, cross_entropy = float(step % 7 == 0), {9: math.nan, 10: math.inf}.get(step % 11, 1.0)
        measured = dict(logit_var=std.square(), disagreement=disagreement, cross_entropy=torch.tensor(cross_entropy))
        trace = trace_of(phi, kept, tokens_per_expert=routed.float(), **measured)
        loop.step(trace, torch.tensor(found_inf) if step % 2 or found_inf else None)
        for layer, *values in zip(layers, *(x.tolist() for x in (phi, kept, routed, std, disagreement))):
            layer.update(*values, ok=found_inf == 0 and cross_entropy == 1)

        c, router = loop.coherence, loop.router_state
        ours = {**c.state_dict(), **router.state_dict(), "observed": c.observed(), "layer_phi": c.layer_phi()}
        ours |= {f"phi_{clock}": c.phi(clock) for clock in ("fast", "mid", "slow")}
        expected = [layer.state() for layer in layers]
        for name in expected[0]:
            theirs = torch.tensor([state[name] for state in expected]).double()
            torch.testing.assert_close(ours[name].double(), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        was_clamped |= (router.beta_coeff.abs() == config.k_max).any().item()
        was_weak |= (router.relevance < 1).any().item()
        if step == 30:
            saved, before = (router.state_dict(), loop.state_dict()), loop_state(loop)
            loop = loop_of(config, L, E, seed=2)
            loop.router_state.load_state_dict(saved[0])
            loop.load_state_dict(saved[1])
            assert_same(loop_state(loop), before)
            assert before["lifecycle.open"].any()
    assert was_clamped and was_weak


def test_the_first_finite_observation_of_logit_std_has_a_weight_of_one():
    state = RouterState(2, 3, chrono())
    for variance in ([torch.inf, 9.0], [4.0, 16.0], [4.0, 0.0]):
        trace = trace_of(torch.zeros(2, 3), torch.ones(2, 3), logit_var=torch.tensor(variance))
        state.update(trace, torch.tensor(True))
    assert state.updates == 2
    torch.testing.assert_close(state.logit_std, torch.tensor([2.0, 4 * state.config.logit_std_alpha]))


def test_debiasing_is_accurate_in_float32_at_the_first_updates():
    buffer = CoherenceBuffer(1, 1, chrono(alpha_slow=0.99999))
    for _ in range(30):
        buffer.update(trace_of([[0.37]], [[1]]), torch.tensor(True))
        assert buffer.phi("slow").item() == pytest.approx(0.37, rel=1e-4)


def test_a_shuffled_expert_follows_another_one_by_a_permutation_from_the_seed():
    follows = derangement(40, 8, seed=3)
    assert (follows != torch.arange(8)).all()
    assert (follows.sort(-1).values == torch.arange(8)).all()
    assert not torch.equal(follows, derangement(40, 8, seed=4))


def test_prune_rules_agree_with_plain_python_on_both_sides_of_every_limit():
    limits = dict(prune_phi=0.5, prune_min_tokens=3, prune_min_updates=2, unused_tokens=2, unused_after=6, window=3)
    config = chrono(starving_phi=0.5, **limits)
    L, E = 500, 3
    c, coordinator = CoherenceBuffer(L, E, config), LifecycleCoordinator(L, E, config)
    for step in (5, 6, 7):
        c.step.fill_(step)
        c.total_tokens_seen.copy_(torch.randint(6, (L, E)))
        c.update_count.copy_(torch.randint(5, (L, E)))
        c.last_update_step.copy_(step - torch.randint(6, (L, E)))
        phi = torch.randint(1, 4, (L, E)) / 4  # exact in float32
        rows = zip(*(x.tolist() for x in (c.total_tokens_seen, c.update_count, c.last_update_step, phi)))
        expected = []
        for counts, updates, last, phis in rows:
            starves = sum(p * n for p, n in zip(phis, counts)) / max(sum(counts), 1) < 0.5
            unused = [step >= 6 and not starves and (n < 2 or step - at >= 3) for n, at in zip(counts, last)]
            low = [p < 0.5 and n > 3 and count > 2 for p, n, count in zip(phis, counts, updates)]
            expected.append((unused, low))
        coordinator.update(c, phi)
        assert torch.equal(coordinator.open, torch.tensor(expected).transpose(0, 1))
        assert coordinator.candidates() == torch.tensor(expected).any(1).sum()


def test_a_candidate_is_reported_once_when_it_opens_and_once_when_it_is_withdrawn():
    limits = dict(prune_phi=0.3, prune_min_tokens=20, prune_min_updates=3, unused_after=2, unused_tokens=10, window=4)
    loop = loop_of(chrono(alpha_slow=0.5, **limits))
    loop.began_at = 100

    def reported():
        return [(d.expert_id, d.reason, d.action, d.step, d.total_tokens_seen) for d in loop.report()]

    for step in range(1, 11):
        loop.step(trace_of([[0.8, 0.1, 0.6]], [[6, 6, 30 if step <= 3 else 0]]))
    # expert 1 has more than 20 tokens and 3 updates from step 4 on; expert 2 has had no token for 4 steps at step 7
    low, unused = ("L0_E1", "low_coherence"), ("L0_E2", "low_observability")
    assert reported() == [(*low, "open", 104, 60), (*unused, "open", 107, 90)]
    assert reported() == [] and loop.read()["lifecycle/candidates"] == 2
    for _ in range(2):
        loop.step(trace_of([[0.8, 0.9, 0.6]], [[6, 6, 30]]))
    assert reported() == [(*unused, "withdrawn", 111, 150), (*low, "withdrawn", 111, 72)]


@pytest.mark.parametrize("at_a_time", [2 * 256 * 8, 30 * 8])  # two of five layers; 30 of a layer's 256 tokens
@pytest.mark.parametrize("scope", ["batch", "token"])
@pytest.mark.parametrize("noisy", [False, True])
def test_statistics_in_groups_and_slices_are_those_of_the_whole(noisy, scope, at_a_time, monkeypatch):
    """And no tensor exceeds the bound, except by the factor K."""
    config = chrono(bridge_threshold=0.01, k_max=2.0, bridge_scope=scope)
    model, _ = build(config, beta=1.0, n_layer=10, use_noisy_top_k=noisy)
    recorded = models.record_routers(model)
    model(*tokens(0, batch=16))
    routings = [routing for _, routing in recorded]
    whole = statistics.routing_sums(routings, config)
    monkeypatch.setattr(statistics, "MAX_ENTRIES", at_a_time)
    with Operators() as operators:
        parts = statistics.routing_sums(routings, config)
    torch.testing.assert_close(parts, whole)
    assert whole["js"].shape == (5,) and operators.largest <= 2 * at_a_time
