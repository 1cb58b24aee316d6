"""What moves beta: every signal against plain Python, its sums against loops over tokens, placebos, the ramp."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chronomoe import ChronoConfig, ChronoLoop, RouterState
from chronomoe.beta import strength_at
from chronomoe.schedule import parse_ramp, parse_schedule
from chronomoe.signals import SIGNALS, _uniform, normal_numbers, random_pattern
from tests.helpers import models, reference
from tests.helpers.models import adamw, assert_same, build, chrono, loop_state, tokens, trace_of, training_step

SCORED = [name for name, signal in SIGNALS.items() if signal.score is not None]
SPREAD = dict(spread=0.05)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("signal", SCORED)
def test_beta_follows_the_smoothed_score_as_in_plain_python_through_skipped_steps_and_a_restart(signal, debias, center):
    config = chrono(signal=signal, eta=0.5, tau=0.0, k_max=0.1, alpha_slow=0.9, ema_debias=debias, center=center)
    L, E = 2, 4
    loop = ChronoLoop(RouterState(L, E, config), [0, 2], seed=3)
    slow, was_clamped = [reference.SlowSignal(config) for _ in range(L)], False
    for step in range(1, 41):
        phi, kept = 2 * torch.rand(L, E) - 1, torch.randint(4, (L, E)) * torch.randint(2, (L, E))
        if step < 4:
            kept[:, 0] = 0  # an expert that is not observed at first
        if step == 21:
            kept[0, 1] = 1
        sums = dict(gated_norm=3 * torch.rand(L, E) * kept, first_order=torch.rand(L, E) * kept)
        sums["tokens_per_expert"] = kept + 1.0  # one token of each expert is over capacity
        if step == 21:
            sums["first_order"][0, 1] = sums["gated_norm"][0, 1] = torch.inf
        trace, ok = trace_of(phi, kept, **sums), step % 5 != 0
        if step % 10 == 1:
            loop.set_worth(torch.randn(L, E))
        loop.step(trace, torch.tensor(float(not ok)))
        raw = {
            # in trace_of only expert 0 is in the mixture, so without it there is no direction
            "leave_one_out": torch.where(torch.arange(E) == 0, 0.0, phi),
            "walk": loop.signals.noise,
            "first_order": sums["first_order"],
            "reap": sums["gated_norm"] / kept.clamp_min(1),
            "worth": loop.signals.worth,
        }[signal]
        phi_slow, updated = loop.coherence.phi("slow").tolist(), loop.coherence.updated().tolist()
        for i, layer in enumerate(slow):
            layer.update(raw[i].tolist(), phi_slow[i], updated[i], ok)
        expected = torch.tensor([layer.beta for layer in slow])
        torch.testing.assert_close(loop.router_state.beta_coeff, expected, rtol=1e-4, atol=1e-5)
        was_clamped |= (expected.abs() == config.k_max).any().item()
        torch.testing.assert_close(loop.signals.score(), torch.tensor([layer.score() for layer in slow]))
        if step == 17:
            saved, before = (loop.router_state.state_dict(), loop.state_dict()), loop_state(loop)
            loop = ChronoLoop(RouterState(L, E, config), [0, 2], seed=4)
            loop.router_state.load_state_dict(saved[0])
            loop.load_state_dict(saved[1])
            assert_same(loop_state(loop), before)
    assert was_clamped and loop.router_state.beta_coeff.std() > 0.03


def test_all_scored_signals_move_beta_as_fast_as_coherence_does():
    phi, kept = torch.tensor([[0.1, 0.4, 0.9, 0.5]]), torch.ones(1, 4)
    speeds = {}
    for signal in ("coherence", "walk", "first_order", "reap", "worth"):
        config = chrono(signal=signal, eta=1e-3, center=True)
        loop = ChronoLoop(RouterState(1, 4, config), [0])
        loop.set_worth(torch.tensor([[3e-3, -1e-3, 0.0, 5e-4]]))
        sums = dict(first_order=torch.tensor([[7e-6, 1e-6, 2e-6, 0.0]]), gated_norm=torch.tensor([[90.0, 1, 2, 3]]))
        loop.step(trace_of(phi, kept, **sums))
        speeds[signal] = loop.router_state.beta_coeff.std(correction=0).item()
    assert list(speeds.values()) == pytest.approx([speeds["coherence"]] * len(speeds), rel=1e-4)


def test_neither_the_unit_nor_the_mean_of_scores_changes_how_fast_they_move_beta():
    betas = []
    for unit, mean in ((1.0, 0.0), (1.0, 1.0), (1e-6, 0.0)):
        loop = ChronoLoop(RouterState(1, 4, chrono(signal="worth", eta=1.0, k_max=10.0)), [0])
        loop.set_worth(unit * torch.tensor([[3e-3, -1e-3, 0.0, 5e-4]]) + mean)
        loop.step(trace_of([[0.1, 0.4, 0.9, 0.5]], torch.ones(1, 4)))
        betas.append(loop.router_state.beta_coeff)
    torch.testing.assert_close(torch.stack(betas), betas[0].expand(3, 1, 4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("signal", ["first_order", "reap", "worth"])
@pytest.mark.parametrize("level", [0.0, 1e-30, 0.1, 1e30])
def test_equal_scores_do_not_move_beta(signal, level):
    loop = ChronoLoop(RouterState(1, 3, chrono(signal=signal, eta=1)), [0])
    equal = torch.full((1, 3), level)
    for _ in range(50):  # rounding of the EMA differs between experts that were observed at different times
        kept = torch.randint(1, 3, (1, 3))
        loop.set_worth(equal)
        loop.step(trace_of([[0.1, 0.5, 0.9]], kept, gated_norm=equal * kept, first_order=equal))
    assert loop.router_state.beta_coeff.abs().max() == 0


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"train_capacity": 0.8, "min_capacity": 1}])
def test_first_order_is_the_sum_of_gate_times_gradient_over_slots_and_micro_batches(changes):
    model, loop = build(chrono(signal="first_order"), **changes)
    model.double()
    found, expected = models.record_routers(model), torch.zeros(2, 8, dtype=torch.float64)
    step = training_step(model, loop, adamw(model), micro_batches=2)
    for block in model.config.moe_blocks:
        model.transformer.h[block].mlp.router.register_forward_hook(lambda _, __, routing: routing.gates.retain_grad())
    trace = step([tokens(0), tokens(1)], 1, lr=0.0).trace
    for i, (_, routing) in enumerate(found):
        for expert, value in zip(routing.experts.flatten().tolist(), (routing.gates * routing.gates.grad).flatten()):
            expected[i % 2, expert] += value.abs().item()
    assert (expected > 0).sum() > 12
    torch.testing.assert_close(trace.first_order, expected)
    again = step([tokens(0), tokens(1)], 2, lr=0.0).trace  # the sums begin again at zero
    torch.testing.assert_close(again.first_order, expected, rtol=0.2, atol=1e-4)


def test_the_scale_of_the_loss_does_not_change_first_order():
    sums = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, loop = build(chrono(signal="first_order"))
        sums.append(training_step(model, loop, adamw(model), scaler=scaler)([tokens(0)], 1).trace.first_order)
    torch.testing.assert_close(*sums)


def test_first_order_leaves_out_the_auxiliary_loss_of_its_layer():
    sums = []
    for use_aux_loss in (False, True):
        model, loop = build(chrono(signal="first_order"), use_aux_loss=use_aux_loss, aux_loss_weight=10.0)
        sums.append(training_step(model, loop, adamw(model))([tokens(0)], 1).trace.first_order)
    # of the last layer: the gates of other layers change the auxiliary losses of the layers above them
    torch.testing.assert_close(sums[0][-1], sums[1][-1])


def test_a_loop_without_a_training_step_reads_first_order_and_sets_it_to_zero_in_place():
    """A CUDA graph writes to the address of the gradient."""
    model, loop = build(chrono(signal="first_order"))
    addresses = set()
    for _ in range(2):
        _, loss, trace = model(*tokens(0), return_trace=True)
        loss.backward()
        expected = model.router_state.probe.grad.clone()
        loop.step(trace)
        assert torch.equal(loop.last.first_order, expected) and expected.max() > 0
        assert model.router_state.probe.grad.abs().max() == 0
        addresses.add(model.router_state.probe.grad.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("signal", SIGNALS)
def test_only_the_signal_that_needs_a_sum_pays_for_it(signal):
    model, loop = build(chrono(signal=signal, **SPREAD), n_layer=1)
    trace = training_step(model, loop, adamw(model))([tokens(0)], 1).trace
    found = [name for name in ("first_order", "gated_norm") if getattr(trace, name) is not None]
    assert found == [name for name in [SIGNALS[signal].needs] if name]


def test_first_order_needs_a_backward():
    model, loop = build(chrono(signal="first_order"))
    with torch.no_grad():
        trace = model(*tokens(0), return_trace=True)[2]
    with pytest.raises(ValueError, match="needs a backward"):
        loop.step(trace)


@pytest.mark.parametrize("changes", [{}, {"train_capacity": 0.8, "min_capacity": 1}])
def test_gated_norm_is_the_sum_of_gate_times_length_over_kept_tokens(changes):
    config = chrono(signal="reap")
    layer = models.moe_layer(chrono=config, **changes)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    bias = SimpleNamespace(beta_eff=torch.zeros(5), relevance=torch.ones(()), probe=None)
    found = layer(x, bias, True)[1]
    weights = {name: p.detach() for name, p in layer.experts.named_parameters()}
    experts, gates = found.routing.experts, found.routing.gates.detach()
    _, y, kept = reference.moe_layer(x.view(-1, 16), experts, gates, weights, layer.capacity(40))
    expected = torch.zeros(5, dtype=torch.float64)
    for n, k in kept.nonzero().tolist():
        expected[experts[n, k]] += gates[n, k] * y[n, k].norm()
    torch.testing.assert_close(found.gated_norm, expected)
    assert kept.all() != bool(changes)


@pytest.mark.parametrize("signal", SIGNALS)
def test_with_beta_off_the_measurements_of_a_signal_change_no_bit(signal):
    """Nor does what moves beta change what else is measured."""

    def train(**settings):
        model, loop = build(ChronoConfig(router=True, coherence=True, **settings), dropout=0.1, use_noisy_top_k=True)
        step = training_step(model, loop, adamw(model), micro_batches=2)
        torch.manual_seed(1)
        traces = [step([tokens(n), tokens(n + 9)], n, logged=n % 2 == 0).trace for n in range(1, 5)]
        losses = {f"loss {i}": trace.cross_entropy for i, trace in enumerate(traces)}
        return losses | dict(model.state_dict()), loop

    plain, _ = train()
    measured, loop = train(signal=signal)
    assert_same(measured, plain)
    assert (loop.signals.score_count.sum() > 0) == (signal in SCORED)


@pytest.mark.parametrize("changes", [dict(signal=signal) for signal in SIGNALS])
def test_a_signal_leaves_the_same_state_for_any_micro_batches_and_interval_of_logs(changes):
    config = chrono(eta=0.05, k_max=2.0, **changes | SPREAD)
    states = []
    for parts, every in ((1, 1), (4, 3)):
        model, loop = build(config, beta=0.5, use_aux_loss=False)
        loop.set_worth(torch.linspace(-1, 1, 16).view(2, 8) ** 3)
        step = training_step(model, loop, adamw(model), micro_batches=parts)
        for n in range(1, 7):
            step(list(zip(*(x.chunk(parts) for x in tokens(n)))), n, logged=n % every == 0)
        states.append(loop_state(loop))
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    assert states[0]["router.beta_coeff"].abs().max() > 0.04


def test_a_frozen_beta_is_a_pattern_of_the_given_spread_from_the_seed_and_stays():
    loops = [ChronoLoop(RouterState(3, 8, chrono(signal="frozen", **SPREAD)), [0, 1, 2], seed) for seed in (1, 1, 2)]
    for loop in loops:
        for _ in range(3):
            loop.step(trace_of(torch.rand(3, 8), torch.randint(3, (3, 8))))
    beta, same, other = (loop.router_state.beta_coeff for loop in loops)
    torch.testing.assert_close(beta.mean(-1), torch.zeros(3), rtol=0, atol=1e-7)
    torch.testing.assert_close(beta.std(-1, correction=0), torch.full((3,), 0.05))
    assert torch.equal(beta, same) and not torch.equal(beta, other) and len({*beta[0].tolist()}) == 8
    assert not torch.equal(beta[0], beta[1])


def test_random_numbers_are_standard_normal_and_differ_in_every_step_and_for_every_key():
    shape, key = torch.Size((40, 50)), torch.tensor(5)
    x = torch.stack([normal_numbers(key, torch.tensor(step), shape) for step in range(1, 51)])
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n) and x.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    quantiles = torch.tensor([-2.0, -1.0, -0.3, 0.5, 1.5])
    share = (x.flatten()[:, None] < quantiles).float().mean(0)
    torch.testing.assert_close(share, torch.special.ndtr(quantiles), rtol=0, atol=5 * 0.5 / math.sqrt(n))
    z = x.flatten(1)
    for lag in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z * torch.stack([*z[1:], z[0]]).roll(7, 1)):
        assert abs(lag.mean()) < 5 / math.sqrt(n)
    assert len(x.unique()) > 0.99 * n
    assert not torch.equal(normal_numbers(torch.tensor(6), torch.tensor(1), shape), x[0])


def test_random_numbers_are_those_of_splitmix64_and_box_muller():
    def mix(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = ((x ^ (x >> shift)) * factor) % 2**64
        return x ^ (x >> 31)

    key, step, expected = 2**61 + 12345, 77, []
    for index in range(6):
        u, v = (((mix(mix(key) + (step * 6 + index) * 2 + i) >> 41) + 0.5) / 2**23 for i in (0, 1))
        expected.append(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v))
    found = normal_numbers(torch.tensor(key), torch.tensor(step), torch.Size((2, 3)))
    torch.testing.assert_close(found, torch.tensor(expected).view(2, 3), rtol=1e-4, atol=1e-5)


def test_the_score_is_logged_by_expert_and_is_null_before_the_first_observation():
    loop = ChronoLoop(RouterState(1, 2, chrono(signal="reap")), [4])
    loop.step(trace_of([[0.5, 0.5]], [[0, 3]], gated_norm=torch.tensor([[0.0, 6.0]])))
    found = loop.read()
    assert found["expert/L4_E0/score"] is None and found["expert/L4_E1/score"] == pytest.approx(2)


def test_uniform_numbers_are_between_0_and_1():
    """A 0 would make the walk infinite."""
    u = _uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert (0 < u).all() and (u < 1).all()


def test_a_walk_depends_on_the_seed_and_goes_on_in_a_skipped_step():
    loops = [ChronoLoop(RouterState(2, 4, chrono(signal="walk")), [0, 2], seed) for seed in (1, 1, 2)]
    trace, seen = trace_of(torch.rand(2, 4), torch.ones(2, 4)), []
    for is_skipped in (0.0, 1.0, 0.0):
        for loop in loops:
            loop.step(trace, torch.tensor(is_skipped))
        one, same, other = (loop.signals.noise.clone() for loop in loops)
        assert torch.equal(one, same) and not torch.isclose(one, other).any()
        assert not any(torch.isclose(one, before).any() for before in seen)
        seen.append(one)


def test_a_walk_has_the_autocorrelation_of_its_factor():
    loop = ChronoLoop(RouterState(100, 20, chrono(signal="walk", alpha_slow=0.9)), list(range(100)))
    trace, seen = trace_of(torch.rand(100, 20), torch.ones(100, 20)), []
    for _ in range(30):
        loop.step(trace)
        seen.append(loop.signals.noise.clone())
    x = torch.stack(seen)
    assert x.std().item() == pytest.approx(1, abs=0.05)
    for lag in (1, 5):
        assert (x[lag:] * x[:-lag]).mean().item() == pytest.approx(0.9**lag, abs=0.05)


def test_the_pattern_is_bounded():
    for experts in (2, 8, 64):
        assert random_pattern(5, experts, 0).abs().max() < 1.75


RAMPS = ["0@0 1@10 0@20", "0.5@0", "1@0 1@5 0.25@6", "0@0 1@100"]


@pytest.mark.parametrize("ramp", RAMPS)
def test_strength_is_linear_between_the_points_of_the_ramp(ramp):
    values, steps = zip(*parse_ramp(ramp))
    found = [strength_at(parse_ramp(ramp), torch.tensor(step)).item() for step in range(30)]
    assert found == pytest.approx(np.interp(range(30), steps, values).tolist())


def test_a_ramp_scales_the_drift_and_the_bound_of_beta():
    config = chrono(signal="load", eta=0.3, k_max=1.0, ramp="0@0 1@4 0@8")
    loop = ChronoLoop(RouterState(1, 2, config), [0])
    trace, seen = trace_of([[0.5, 0.5]], [[1, 3]]), []
    for _ in range(8):
        loop.step(trace)
        seen.append(loop.router_state.beta_coeff[0, 0].item())
        assert loop.read()["beta/strength"] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0][len(seen)])
    # drift 0.3 s up to 0.25 + 0.5 + 0.75 + 1 + ..., bound s
    assert seen == pytest.approx([0.075, 0.225, 0.45, 0.75, 0.75, 0.5, 0.25, 0.0])
    skipped = ChronoLoop(RouterState(1, 2, chrono(signal="load", eta=0.3, k_max=1.0, ramp="0.5@0")), [0])
    skipped.step(trace, torch.tensor(1.0))
    assert skipped.router_state.beta_coeff.abs().max() == 0


def test_a_ramp_counts_the_steps_of_the_run():
    loop = ChronoLoop(RouterState(1, 2, chrono(signal="load", ramp="0@0 1@8")), [0])
    loop.began_at = 3  # step 2 was switched on after three steps
    loop.step(trace_of([[0.5, 0.5]], [[1, 3]]))
    assert loop.strength().item() == 0.5


def test_a_name_in_a_schedule_can_hold_the_sign():
    assert parse_schedule("a@b@0 c@12") == [("a@b", 0), ("c", 12)]


SCHEDULES = {
    "": "must begin at step 0",
    "1@1": "must begin at step 0",
    "1@0 2@5 3@5": "must rise",
    "1@0 2": "'2' must be VALUE@STEP",
    "1@-1": "'1@-1' must be VALUE@STEP",
    "@0": "'@0' must be VALUE@STEP",
    "1@0 2@1e3": "'2@1e3' must be VALUE@STEP",
    "1@0 2@٣": "must be VALUE@STEP",
    "1@0 2@" + "9" * 5000: "must be VALUE@STEP",
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_wrong_schedule_is_refused(text):
    with pytest.raises(ValueError, match=SCHEDULES[text]):
        parse_schedule(text)


@pytest.mark.parametrize("ramp", ["nan@0", "inf@0", "-0.1@0", "x@0", "1.01@0"])
def test_a_wrong_strength_is_refused(ramp):
    with pytest.raises(ValueError, match=r"ramp: the strength .* must be a number from 0 to 1"):
        chrono(ramp=ramp)


def test_a_frozen_beta_needs_its_spread_and_has_no_ramp():
    with pytest.raises(ValueError, match="needs spread"):
        chrono(signal="frozen")
    with pytest.raises(ValueError, match="ramp"):
        chrono(signal="frozen", ramp="1@0", **SPREAD)
    assert ChronoConfig(signal="frozen").spread is None  # while step 3 is off


def test_first_order_needs_the_router():
    with pytest.raises(ValueError, match="needs router=True"):
        ChronoConfig(coherence=True, signal="first_order")
