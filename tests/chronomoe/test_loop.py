"""The loop's state, step by step against plain Python, and what it costs and leaves unchanged."""

import math

import pytest
import torch

import model as model_module
from chronomoe import ChronoConfig, ChronoLoop, CoherenceBuffer, LifecycleCoordinator, RouterState, statistics
from chronomoe.beta import derangement
from tests.helpers import reference
from tests.helpers.models import (
    Operators,
    adamw,
    assert_same,
    build,
    chrono,
    draw_beta,
    loop_state,
    state_of,
    tokens,
    trace_of,
    train_step,
)  # fmt: skip

YES = torch.tensor(True)


def loop_of(config, num_layers=1, num_experts=3, seed=0):
    return ChronoLoop(RouterState(num_layers, num_experts, config), list(range(0, 2 * num_layers, 2)), seed)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"center": True},
        {"signal": "shuffled"},
        {"signal": "shuffled", "center": True},
        {"signal": "load"},
        {"ema_debias": False},
    ],
)
def test_state_follows_plain_python_through_skipped_steps_and_absent_experts(changes):
    rates = dict(alpha_fast=0.5, alpha_mid=0.8, alpha_slow=0.95, logit_std_alpha=0.7)
    config = chrono(eta=0.1, tau=0.2, k_max=0.125, window=3, bridge_threshold=0.2, **rates, **changes)
    L, E = 2, 4
    loop = loop_of(config, L, E, seed=1)
    slow = [reference.SlowLoop(config, follows) for follows in loop.follows.tolist()]
    assert loop.coherence.layer_phi().tolist() == [0, 0]
    was_clamped = False
    for step in range(60):
        phi, kept = 2 * torch.rand(L, E) - 1, torch.randint(3, (L, E)) * torch.randint(2, (L, E))
        routed, std, disagreement = kept + torch.randint(3, (L, E)), 1 + torch.rand(L), torch.rand(L)
        phi[0, 1] = math.nan if step % 8 == 5 else 0.5  # a phi that is not finite is not used
        found_inf, cross_entropy = float(step % 7 == 3), (math.nan, math.inf, 1.0)[min(step % 11, 2)]
        ok = found_inf == 0 and cross_entropy == 1
        measured = dict(logit_var=std.square(), disagreement=disagreement, cross_entropy=torch.tensor(cross_entropy))
        trace = trace_of(phi, kept, tokens_per_expert=routed.float(), **measured)
        loop.step(trace, torch.tensor(found_inf) if step % 2 or found_inf else None)
        for one, *values in zip(slow, *(x.tolist() for x in (phi, kept, routed, std, disagreement))):
            one.update(*values, ok)

        c, router = loop.coherence, loop.router_state
        was_clamped |= (router.beta_coeff.abs() == config.k_max).any().item()
        ours = {name: getattr(c, name) for name in ("update_count", "total_tokens_seen", "last_update_step")}
        ours |= {"beta": router.beta_coeff, "logit_std": router.logit_std, "disagreement": router.disagreement}
        ours |= {"relevance": router.relevance, "observed": c.observed(), "layer_phi": c.layer_phi()}
        ours |= {f"phi_{clock}": c.phi(clock) for clock in ("fast", "mid", "slow")}
        expected = [one.state() for one in slow]
        for name, value in ours.items():
            theirs = torch.tensor([state[name] for state in expected]).double()
            torch.testing.assert_close(value.double(), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert was_clamped and router.relevance.min() < 1


def test_debiasing_is_accurate_in_float32_at_the_first_updates():
    buffer = CoherenceBuffer(1, 1, chrono(alpha_slow=0.99999))
    for _ in range(30):
        buffer.update(trace_of([[0.37]], [[1]]), YES)
        assert buffer.phi("slow").item() == pytest.approx(0.37, rel=2e-3)


def test_a_statistic_that_is_not_finite_leaves_logit_std_and_relevance_unchanged():
    loop = loop_of(chrono(bridge_threshold=0.2))
    first = trace_of([[0.5] * 3], [[1] * 3], logit_var=torch.tensor([9.0]), disagreement=torch.tensor([0.4]))
    nan = torch.tensor([math.nan])
    for trace in (first, trace_of([[0.5] * 3], [[1] * 3], logit_var=nan, disagreement=nan)):
        loop.step(trace)
        assert loop.router_state.logit_std.item() == pytest.approx(3.0)
        assert loop.router_state.relevance.item() == pytest.approx(0.5)


def test_a_shuffled_expert_follows_another_one_by_a_permutation_from_the_seed():
    follows = derangement(40, 8, seed=3)
    assert (follows != torch.arange(8)).all()
    assert (follows.sort(-1).values == torch.arange(8)).all()
    assert torch.equal(follows, derangement(40, 8, seed=3)) and not torch.equal(follows, derangement(40, 8, seed=4))
    assert torch.equal(loop_of(chrono(signal="shuffled"), 40, 8, seed=3).follows, follows)


def test_a_step_that_is_not_finite_changes_no_weight_and_no_state():
    model, loop = build(chrono(eta=0.1))
    optimizer = adamw(model)
    train_step(model, loop, optimizer, [tokens(0)])
    before = state_of(model, loop)
    with torch.no_grad():
        kept = model.lm_head.weight[0, 0].item()
        model.lm_head.weight[0, 0] = math.inf
    train_step(model, loop, optimizer, [tokens(1)])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = kept
    after = state_of(model, loop)
    assert after.pop("coherence.step") == before.pop("coherence.step") + 1
    assert_same(after, before)
    train_step(model, loop, optimizer, [tokens(2)])
    assert all(value.isfinite().all() for value in loop_state(loop).values())
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_state_stays_float32_when_the_model_is_cast():
    model, loop = build(chrono())
    draw_beta(model)
    before = model.router_state.beta_coeff.clone()
    model.to(torch.bfloat16)
    loop.coherence.half()
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert torch.equal(model.router_state.beta_coeff, before)
    assert all(b.dtype in (torch.float32, torch.int64) for b in loop.coherence.buffers())
    assert model.double().router_state.beta_coeff.dtype == torch.float64


def test_saved_state_continues_bit_for_bit():
    config = chrono(eta=0.2, signal="shuffled", prune_phi=1.0, prune_min_tokens=10, prune_min_updates=1)
    runs = []
    for stop in (None, 3):
        model, loop = build(config)
        optimizer = adamw(model)
        for step in range(6):
            if step == stop:
                saved = model.state_dict(), optimizer.state_dict(), loop.state_dict()
                model, loop = build(config, seed=9)
                loop.follows = derangement(2, 8, seed=9)
                optimizer = adamw(model)
                for part, state in zip((model, optimizer, loop), saved):
                    part.load_state_dict(state)
            train_step(model, loop, optimizer, [tokens(step)])
        runs.append(state_of(model, loop))
    assert_same(*runs)
    assert runs[0]["lifecycle.open"].any()


@pytest.mark.parametrize(("changes", "read"), [({}, {"load_cv", "dropped", "load"}), ({"n_exp": 1}, set())])
def test_with_all_steps_off_only_loads_are_read_and_no_state_changes(changes, read):
    model, loop = build(ChronoConfig(), **changes)
    before = loop_state(loop)
    train_step(model, loop, adamw(model), [tokens(0)])
    assert {name.rsplit("/", 1)[1] for name in loop.read()} == read and loop.report() == []
    assert_same(loop_state(loop), before)


# Lifecycle


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
        for tokens_seen, updates, last, phis in rows:
            starves = sum(p * n for p, n in zip(phis, tokens_seen)) / max(sum(tokens_seen), 1) < 0.5
            unused = [step >= 6 and not starves and (n < 2 or step - at >= 3) for n, at in zip(tokens_seen, last)]
            low = [p < 0.5 and n > 3 and count > 2 for p, n, count in zip(phis, tokens_seen, updates)]
            expected.append((unused, low))
        assert torch.equal(coordinator.evaluate(c, phi), torch.tensor(expected).transpose(0, 1))
        coordinator.update(c, phi)
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


# Steps that log, and costs


@pytest.mark.parametrize("changes", [{}, {"bridge_scope": "token", "bridge_signal": "overlap"}, {"bridge": False}])
def test_steps_that_log_and_steps_that_do_not_leave_the_same_state(changes):
    """Otherwise the interval between logged steps would change a run's result."""
    states, losses = [], []
    for kinds in ([True] * 6, [False] * 6, [False, True] * 3):
        model, loop = build(chrono(eta=0.05, bridge_threshold=0.01, **changes))
        optimizer = adamw(model)
        losses.append([train_step(model, loop, optimizer, [tokens(i)], logged=kind) for i, kind in enumerate(kinds)])
        states.append(loop_state(loop))
    assert losses[0] == losses[1] == losses[2]
    for state in states[1:]:
        assert_same(state, states[0])
    assert states[0]["coherence.step"] == 6 and (states[0]["router.beta_coeff"] != 0).any()


def test_a_compiled_update_leaves_the_same_state():
    states = []
    for compiled in (False, True):
        model, loop = build(chrono(eta=0.05, bridge_threshold=0.01))
        if compiled:
            loop.compile(backend="aot_eager")
        for i in range(3):
            loop.step(model(*tokens(i), return_trace=True)[2], torch.zeros(()))
        states.append(loop_state(loop))
    assert_same(*states)
    assert (states[1]["router.beta_coeff"] != 0).any()


def test_the_number_of_operators_does_not_depend_on_the_number_of_layers(monkeypatch):
    """For the loop's update and for the statistics of a forward."""
    counts = []
    for layers in (2, 12):
        model, loop = build(chrono(), n_layer=2 * layers)
        of_forward = Operators()

        def counted(*args, operators=of_forward, **options):
            with operators:
                return statistics.collect_trace(*args, **options)

        monkeypatch.setattr(model_module, "collect_trace", counted)
        trace = model(*tokens(0), return_trace=True)[2]
        with Operators() as update:
            loop.step(trace)
        counts.append((of_forward.count, update.count))
    assert counts[0] == counts[1] and min(counts[0]) > 0


@pytest.mark.parametrize("at_a_time", [2 * 256 * 8, 30 * 8])  # two of five layers; 30 of a layer's 256 tokens
@pytest.mark.parametrize("changes", [{}, {"bridge_scope": "token"}])
@pytest.mark.parametrize("noisy", [False, True])
def test_statistics_of_groups_and_slices_are_those_of_the_whole_in_bounded_memory(
    noisy, changes, at_a_time, monkeypatch
):
    config = chrono(bridge_threshold=0.01, k_max=2.0, **changes)
    model, loop = build(config, n_layer=10, use_noisy_top_k=noisy)
    draw_beta(model)
    routings = []
    for block in loop.layer_ids:
        model.transformer.h[block].mlp.router.register_forward_hook(lambda *args: routings.append(args[-1]))
    model(*tokens(0, batch=16))
    whole = statistics.routing_sums(routings, config)
    monkeypatch.setattr(statistics, "MAX_ENTRIES", at_a_time)
    with Operators() as operators:
        parts = statistics.routing_sums(routings, config)
    assert whole.keys() == parts.keys() and whole["js"].shape == (5,)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)
    assert operators.largest <= 2 * at_a_time  # the rank of each of the two choices
