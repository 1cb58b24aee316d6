"""The loop's state: clocks, beta, bridge, lifecycle; step by step against plain Python."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from chronomoe import (
    ChronoConfig,
    ChronoLoop,
    CoherenceBuffer,
    LifecycleCoordinator,
    MoETrace,
    RouterState,
    statistics,
    update_beta,
)
from chronomoe.beta import derangement
from tests.helpers.models import adamw, build, chrono, draw_beta, loop_state, tokens, train_step

YES = torch.tensor(True)


def trace(phi, kept, disagreement=(0.0,), logit_std=(1.0,)):
    """A trace of one layer in which expert e has coherence phi[e] (mixture: the first axis) and kept[e] tokens."""
    E = len(phi)
    output = torch.zeros(1, E, E + 2)
    for e, value in enumerate(phi):
        output[0, e, 0], output[0, e, e + 1] = value, math.sqrt(1 - value * value)
    gated = torch.zeros(1, E, E + 2)
    gated[0, 0, 0] = 1.0
    kept = torch.tensor([kept], dtype=torch.float32)
    one = torch.ones(())
    zero = torch.zeros(1)
    return MoETrace(
        tokens=one, batches=one, cross_entropy=one, aux_loss=one, router_z_loss=one, chosen=kept, kept=kept,
        prob=torch.full((1, E), 1 / E), logit_var=torch.tensor(logit_std).square(), js=zero, overlap=zero, flip=zero,
        flip_set=zero, disagreement=torch.tensor(disagreement), relevance=zero, output=output, gated_output=gated,
    )  # fmt: skip


def loop_of(E=3, **changes):
    config = chrono(**changes)
    return ChronoLoop(RouterState(1, E, config), layer_ids=[0])


def test_debiased_clocks_read_the_truth_from_the_first_step_on():
    loop = loop_of()
    for step in range(1, 40):
        loop.step(trace([0.8, 0.2, -0.3], [5, 5, 5 if step == 1 else 0]))
        for clock in ("fast", "mid", "slow"):
            torch.testing.assert_close(loop.coherence.phi(clock), torch.tensor([[0.8, 0.2, -0.3]]))
    plain = loop_of(ema_debias=False)
    for _ in range(100):
        plain.step(trace([0.8, 0.2, -0.3], [5, 5, 5]))
    expected = 0.8 * (1 - 0.999**100)  # a tenth of the truth
    assert plain.coherence.phi("slow")[0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_debiasing_is_accurate_in_float32_at_the_first_updates():
    buffer = CoherenceBuffer(1, 1, chrono(alpha_slow=0.99999))
    raw = torch.tensor([[[0.0, 0.37]]])
    for n in range(1, 30):
        buffer.update(trace([0.37], [1]), YES)
        assert buffer.phi("slow").item() == pytest.approx(0.37, rel=2e-3), (n, raw)


def test_experts_without_tokens_keep_phi_counts_and_last_step():
    loop = loop_of(window=4)
    loop.step(trace([0.5, 0.6, 0.7], [10, 20, 0]))
    for _ in range(5):
        loop.step(trace([0.1, 0.1, 0.1], [10, 0, 0]))
    c = loop.coherence
    assert c.phi("slow")[0, 1].item() == pytest.approx(0.6)
    assert c.update_count.tolist() == [[6, 1, 0]]
    assert c.total_tokens_seen.tolist() == [[60, 20, 0]]
    assert c.last_update_step.tolist() == [[6, 1, -1]]
    assert c.observed().tolist() == [[True, False, False]]
    states = loop.snapshot()
    assert states[0, 2].phi_slow is None and states[0, 2].last_update_step == -1
    assert states[0, 1].expert_id == "L0_E1" and not states[0, 1].is_being_observed
    values = loop.read()
    assert values["expert/L0_E2/phi_slow"] is None
    tokens_seen, phis = [60, 20], [c.phi("slow")[0, 0].item(), 0.6]
    layer = sum(n * p for n, p in zip(tokens_seen, phis)) / 80  # never observed: left out
    assert values["coherence/L0/layer"] == pytest.approx(layer, rel=1e-5)
    assert values["coherence/L0/phi_slow_min"] == pytest.approx(min(phis), rel=1e-5)


def test_beta_falls_below_tau_rises_above_and_stops_at_the_clamp():
    loop = loop_of(eta=0.1, tau=0.5, k_max=0.12)
    for step in range(1, 8):
        loop.step(trace([0.8, 0.2, 0.5], [5, 5, 0]))
        expected = [min(0.12, 0.03 * step), max(-0.12, -0.03 * step), 0.0]
        torch.testing.assert_close(loop.router_state.beta_coeff, torch.tensor([expected]))
    assert loop.read()["beta/L0/clamped"] == pytest.approx(2 / 3)
    assert loop.read()["beta/L0/spread"] == pytest.approx(0.24)


def test_centring_takes_out_the_mean_drift_of_the_experts_that_move():
    loop = loop_of(eta=0.1, tau=0.9, center=True, k_max=10.0)
    loop.step(trace([0.8, 0.2, 0.5], [5, 5, 0]))
    torch.testing.assert_close(loop.router_state.beta_coeff, torch.tensor([[0.03, -0.03, 0.0]]))
    for _ in range(3):  # expert 1 still has its phi of 0.2
        loop.step(trace([0.8, 0.2, 0.5], [5, 0, 5]))
    torch.testing.assert_close(loop.router_state.beta_coeff, torch.tensor([[0.075, -0.03, -0.045]]))
    loop.step(trace([0.8, 0.2, 0.5], [5, 0, 0]))  # one expert alone is its own mean
    torch.testing.assert_close(loop.router_state.beta_coeff, torch.tensor([[0.075, -0.03, -0.045]]))


def test_beta_of_an_expert_moves_only_in_steps_that_give_it_tokens():
    """Its phi is frozen in the others, and beta would follow it to the clamp."""
    loop = loop_of(eta=0.1, tau=0.6, window=1000, k_max=10.0)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(3)
    phi = torch.tensor([0.9, 0.2, 0.5])
    for _ in range(30):
        kept = torch.randint(2, (3,), generator=generator)
        loop.step(trace(phi.tolist(), kept.tolist()))
        expected += 0.1 * (phi - 0.6) * kept
        torch.testing.assert_close(loop.router_state.beta_coeff[0], expected)
    before = loop.router_state.beta_coeff.clone()
    for _ in range(50):
        loop.step(trace(phi.tolist(), [5, 0, 0]))
    assert torch.equal(loop.router_state.beta_coeff[0, 1:], before[0, 1:])
    assert loop.coherence.observed().all()  # the window is that of the lifecycle


def test_a_shuffled_beta_moves_where_the_expert_that_it_follows_got_tokens():
    loop = loop_of(signal="shuffled", eta=0.1, tau=0.0, k_max=10.0)
    phi = torch.tensor([0.8, 0.2, -0.3])
    loop.step(trace(phi.tolist(), [5, 5, 5]))
    before = loop.router_state.beta_coeff[0].clone()
    loop.step(trace(phi.tolist(), [5, 0, 0]))
    followed = loop.follows[0] == 0
    assert followed.sum() == 1
    torch.testing.assert_close(loop.router_state.beta_coeff[0], before + 0.1 * 0.8 * followed)


@pytest.mark.parametrize("signal", ["coherence", "shuffled", "load"])
def test_a_skipped_step_moves_no_beta_whatever_drives_it(signal):
    loop = loop_of(signal=signal, eta=0.1, tau=0.0)
    loop.step(trace([0.8, 0.2, -0.3], [6, 5, 4]))
    before = loop.router_state.beta_coeff.clone()
    assert before.any()
    loop.step(trace([0.8, 0.2, -0.3], [6, 5, 4]), torch.ones(()))
    assert torch.equal(loop.router_state.beta_coeff, before)
    loop.step(trace([0.8, 0.2, -0.3], [6, 5, 4]), torch.zeros(()))
    assert not torch.equal(loop.router_state.beta_coeff, before)


def test_update_beta_alone_follows_a_buffer():
    config = chrono(eta=0.2, tau=0.1)
    state, buffer = RouterState(1, 2, config), CoherenceBuffer(1, 2, config)
    buffer.update(trace([0.6, -0.4], [1, 1]), YES)
    update_beta(state, buffer, YES)
    torch.testing.assert_close(state.beta_coeff, torch.tensor([[0.1, -0.1]]))


def test_shuffled_signal_gives_each_expert_anothers_coherence():
    follows = derangement(40, 8, seed=3)
    assert (follows != torch.arange(8)).all()
    assert (follows.sort(-1).values == torch.arange(8)).all()
    assert torch.equal(follows, derangement(40, 8, seed=3)) and not torch.equal(follows, derangement(40, 8, seed=4))
    loop = loop_of(signal="shuffled", eta=0.1, tau=0.0)
    phi = torch.tensor([0.8, 0.2, -0.3])
    loop.step(trace(phi.tolist(), [5, 5, 5]))
    torch.testing.assert_close(loop.router_state.beta_coeff[0], 0.1 * phi[loop.follows[0]])


def test_load_signal_moves_beta_by_the_sign_of_the_load_error_recentred():
    loop = loop_of(E=4, signal="load", eta=0.1)
    loop.step(trace([0.5] * 4, [10, 2, 3, 5]))
    drift = torch.tensor([-0.1, 0.1, 0.1, 0.0])
    torch.testing.assert_close(loop.router_state.beta_coeff[0], drift - drift.mean())
    loop.step(trace([0.5] * 4, [10, 0, 5, 5]))  # an expert without tokens rises
    drift += torch.tensor([-0.1, 0.1, 0.0, 0.0])
    torch.testing.assert_close(loop.router_state.beta_coeff[0], drift - drift.mean())


def test_logit_std_starts_at_its_first_observation():
    loop = loop_of(logit_std_alpha=0.9)
    loop.step(trace([0.5] * 3, [1] * 3, logit_std=(3.0,)))
    assert loop.router_state.logit_std.item() == pytest.approx(3.0)
    loop.step(trace([0.5] * 3, [1] * 3, logit_std=(5.0,)))
    assert loop.router_state.logit_std.item() == pytest.approx(0.9 * 3 + 0.1 * 5)


def test_relevance_follows_the_stored_disagreement_of_the_last_step():
    loop = loop_of(bridge_threshold=0.2)
    for seen, r in ((0.1, 1.0), (0.4, 0.5), (0.9, 0.0), (0.1, 1.0)):
        loop.step(trace([0.5] * 3, [1] * 3, disagreement=(seen,)))
        assert loop.router_state.relevance.item() == pytest.approx(r)
        assert loop.router_state.disagreement.item() == pytest.approx(seen)


def test_full_strength_disagreement_does_not_alternate():
    """The plan's relevance, taken from the routing that was used, swings between weak and full; ours settles."""
    model, loop = build(chrono(bridge_threshold=0.02, k_max=3.0, eta=0.0), use_aux_loss=False)
    draw_beta(model)
    relevances = []
    for _ in range(6):
        loop.step(model(*tokens(0), return_trace=True)[2])
        relevances.append(model.router_state.relevance.clone())
    # from the second step on (the first reads a logit_std not observed yet) the same batch gives the same r
    for earlier, later in itertools.pairwise(relevances[1:]):
        torch.testing.assert_close(earlier, later, rtol=0, atol=0.15)
    assert torch.stack(relevances).min() < 1


def test_a_bridge_that_is_off_leaves_beta_at_full_strength():
    model, _ = build(chrono(bridge=False))
    draw_beta(model)
    model.router_state.relevance.zero_()  # as left by a run with the bridge on
    assert all(bias.relevance == 1 for bias in model.router_state.layer_biases())


def test_a_non_finite_step_changes_nothing_but_time():
    model, loop = build(chrono(eta=0.1))
    optimizer = adamw(model)
    train_step(model, loop, optimizer, [tokens(0)])
    before = loop_state(loop)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        kept = model.lm_head.weight[0, 0].item()
        model.lm_head.weight[0, 0] = math.inf
    train_step(model, loop, optimizer, [tokens(1)])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = kept
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for name, value in loop_state(loop).items():
        assert torch.equal(value, before[name]) or name == "coherence.step", name
    assert loop.coherence.step == 2
    train_step(model, loop, optimizer, [tokens(2)])
    assert all(value.isfinite().all() for value in loop_state(loop).values())
    assert not torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_variance_that_is_no_number_is_not_taken_in():
    loop = loop_of(logit_std_alpha=0.9)
    loop.step(trace([0.5] * 3, [1] * 3, logit_std=(3.0,)))
    loop.step(trace([0.5] * 3, [1] * 3, logit_std=(math.nan,), disagreement=(math.nan,)))
    assert loop.router_state.logit_std.item() == pytest.approx(3.0)
    assert loop.router_state.relevance.item() == 1.0


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
    runs = []
    for stop in (None, 3):
        model, loop = build(chrono(eta=0.2, prune_min_tokens=10, prune_min_updates=1))
        optimizer = adamw(model)
        for step in range(6):
            if step == stop:
                saved = model.state_dict(), optimizer.state_dict(), loop.state_dict()
                model, loop = build(chrono(eta=0.2, prune_min_tokens=10, prune_min_updates=1), seed=9)
                optimizer = adamw(model)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                loop.load_state_dict(saved[2])
            train_step(model, loop, optimizer, [tokens(step)])
        runs.append(loop_state(loop) | dict(model.state_dict()))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_all_steps_off_the_loop_keeps_only_loads():
    model, loop = build(ChronoConfig())
    train_step(model, loop, adamw(model), [tokens(0)])
    assert {name.rsplit("/", 1)[1] for name in loop.read()} == {"load_cv", "dropped", "load"}
    assert (model.router_state.beta_coeff == 0).all() and loop.coherence.step == 0


def test_a_dense_model_has_nothing_to_read():
    model, loop = build(n_exp=1)
    train_step(model, loop, adamw(model), [tokens(0)])
    assert loop.read() == {} and loop.report() == []


# Lifecycle


def opened(loop):
    return [(d.expert_id, d.reason, d.action, d.step) for d in loop.report()]


def test_low_coherence_opens_at_its_step_once_and_is_withdrawn():
    loop = loop_of(prune_phi=0.3, prune_min_tokens=20, prune_min_updates=3, alpha_slow=0.5)
    for _ in range(10):
        loop.step(trace([0.8, 0.1, 0.6], [6, 6, 6]))
    # over 20 tokens from step 4 on (24), over 3 updates from step 4 on
    assert opened(loop) == [("L0_E1", "low_coherence", "open", 4)]
    assert opened(loop) == []
    assert loop.read()["lifecycle/candidates"] == 1
    loop.step(trace([0.8, 0.9, 0.6], [6, 6, 6]))
    loop.step(trace([0.8, 0.9, 0.6], [6, 6, 6]))
    assert opened(loop) == [("L0_E1", "low_coherence", "withdrawn", 11)]


@pytest.mark.parametrize(("healthy", "proposed"), [(0.8, True), (0.4, False)])
def test_a_starved_expert_is_proposed_unless_its_layer_starves(healthy, proposed):
    loop = loop_of(unused_after=5, unused_tokens=10, window=100)
    for step in range(1, 9):
        loop.step(trace([healthy] * 3, [50, 50, 9 if step == 1 else 0]))
    found = [("L0_E2", "low_observability", "open", 5)] if proposed else []
    assert opened(loop) == found
    assert loop.read()["coherence/L0/starving"] == (not proposed)


def test_an_expert_that_dies_late_is_found_after_the_window():
    loop = loop_of(unused_after=2, unused_tokens=10, window=4)
    for step in range(1, 12):
        loop.step(trace([0.8] * 3, [50, 50, 50 if step <= 3 else 0]))
    assert opened(loop) == [("L0_E2", "low_observability", "open", 7)]
    loop.step(trace([0.8] * 3, [50, 50, 50]))
    assert opened(loop) == [("L0_E2", "low_observability", "withdrawn", 12)]


def test_proposals_execute_nothing():
    config = dict(prune_phi=1.0, prune_min_tokens=0, prune_min_updates=0)  # everything is a candidate
    results = []
    for lifecycle in (True, False):
        model, loop = build(chrono(eta=0.1, lifecycle=lifecycle, **config))
        optimizer = adamw(model)
        for step in range(4):
            train_step(model, loop, optimizer, [tokens(step)])
        assert len(loop.report()) == (16 if lifecycle else 0)
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_before_any_token_no_layer_statistic_divides_by_zero():
    config = chrono(unused_after=0)
    buffer, coordinator = CoherenceBuffer(1, 3, config), LifecycleCoordinator(1, 3, config)
    assert buffer.layer_phi().tolist() == [0.0]
    coordinator.update(buffer)
    assert coordinator.candidates() == 0  # a layer without tokens starves


@pytest.mark.parametrize("changes", [{}, {"bridge_scope": "token", "bridge_signal": "overlap"}, {"bridge": False}])
def test_steps_that_log_and_steps_that_do_not_leave_the_same_state(changes):
    """Else how often a run logs would change its result."""
    states, losses = [], []
    for kinds in ([True] * 6, [False] * 6, [False, True] * 3):
        model, loop = build(chrono(eta=0.05, bridge_threshold=0.01, **changes))
        optimizer = adamw(model)
        losses.append([train_step(model, loop, optimizer, [tokens(i)], logged=kind) for i, kind in enumerate(kinds)])
        states.append(loop_state(loop))
    for state, loss in zip(states[1:], losses[1:]):
        assert loss == losses[0]
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    assert states[0]["coherence.step"] == 6 and (states[0]["router.beta_coeff"] != 0).any()


class Kernels(TorchDispatchMode):
    """Counts operators, which are kernels where they compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def kernels_of(layers: int) -> tuple[int, int]:
    """Operators of the loop's step, and of the statistics that the forward gathers, with so many MoE layers."""
    model, loop = build(chrono(), n_layer=2 * layers)
    caught = []
    gather = model_module.collect_trace
    model_module.collect_trace = lambda *args, **kwargs: caught.append((args, kwargs)) or gather(*args, **kwargs)
    try:
        trace = model(*tokens(0), return_trace=True)[2]
    finally:
        model_module.collect_trace = gather
    with Kernels() as step:
        loop.step(trace)
    args, kwargs = caught[0]
    with Kernels() as statistics:
        gather(*args, **kwargs)
    return step.count, statistics.count


def test_the_loop_and_the_statistics_take_as_many_kernels_for_twelve_layers_as_for_two():
    assert kernels_of(2) == kernels_of(12)
    assert kernels_of(2)[0] < 100


def test_layers_taken_in_groups_give_the_same_statistics(monkeypatch):
    model, _ = build(chrono(), n_layer=10)
    draw_beta(model)
    whole = model(*tokens(0), return_trace=True)[2]
    monkeypatch.setattr(statistics, "MAX_ENTRIES", 2 * 8 * 16 * 8)  # two layers of the five at a time
    grouped = model(*tokens(0), return_trace=True)[2]
    for name, value in whole.present().items():
        torch.testing.assert_close(value, getattr(grouped, name))


def layers_of(config, noisy):
    """The routings of a model's MoE layers for one batch of 256 tokens."""
    model, loop = build(config, use_noisy_top_k=noisy)
    draw_beta(model)
    found = []
    for block in loop.layer_ids:
        model.transformer.h[block].mlp.router.register_forward_hook(lambda *args: found.append(args[-1]))
    model(*tokens(0, batch=16))
    return found


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("scope", ["batch", "token"])
def test_a_layer_over_the_bound_is_taken_in_slices_of_tokens(scope, noisy, monkeypatch):
    config = chrono(bridge_scope=scope, bridge_threshold=0.01, k_max=2.0)
    routings = layers_of(config, noisy)
    whole = statistics.routing_sums(routings, config)
    allowed = 8 * 30  # 30 of the 256 tokens: the last slice is shorter
    monkeypatch.setattr(statistics, "MAX_ENTRIES", allowed)
    with Largest() as largest:
        sliced = statistics.routing_sums(routings, config)
    assert whole.keys() == sliced.keys() and whole["js"].shape == (2,)
    for name, value in whole.items():
        torch.testing.assert_close(sliced[name], value)
    assert largest.entries == 2 * allowed  # of each of the two choices, whether an expert's logit is larger


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operator returns; views of its arguments are not counted."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and not out._is_view():
            self.entries = max(self.entries, out.numel())
        return out


def test_a_compiled_step_does_what_the_step_does():
    states = []
    for compiled in (False, True):
        model, loop = build(chrono(eta=0.05, bridge_threshold=0.01))
        if compiled:
            loop.compile(backend="aot_eager")
        for i in range(3):
            loop.step(model(*tokens(i), return_trace=True)[2], torch.zeros(()))
        states.append(loop_state(loop))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert (states[1]["router.beta_coeff"] != 0).any()
