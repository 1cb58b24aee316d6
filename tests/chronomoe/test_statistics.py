"""What a forward and the loop measure, against loops over tokens and experts (tests/helpers/reference.py)."""

import math
from statistics import fmean, pstdev

import pytest
import torch

from chronomoe import ChronoConfig, ChronoRouter, RouterBias
from chronomoe.bridge import bias_needed, compute_flip_rate, compute_js_divergence, reach
from comparison.probe import gate_mass_moved
from ops.dispatch import plan_dispatch
from tests.helpers import reference
from tests.helpers.models import build, chrono, moe_layer, record_routers, tokens

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
FULL = torch.ones(())


def close(ours, theirs, dtype):
    ours, theirs = (torch.as_tensor(math.nan if x is None else x, dtype=torch.float64) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2, equal_nan=True)


CASES = [
    ("mixture", None, False, "js"),
    ("mixture", 0.75, True, "overlap"),
    ("leave_one_out", 0.75, False, "js"),
    ("leave_one_out", None, True, "overlap"),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rule", "capacity", "bias", "signal"), CASES)
def test_every_metric_of_a_step_agrees_with_the_slow_version(rule, capacity, bias, signal, dtype):
    config = chrono(reference=rule, bridge_signal=signal, k_max=1.5, eta=0.1, tau=0.3, starving_phi=0.35)
    model, loop = build(config, beta=1.5, n_embd=16, train_capacity=capacity, bias=bias)
    with torch.no_grad():
        for p in model.parameters():  # spread the logits, and biases away from zero
            p.add_(0.3 * torch.randn(p.shape))
    model, _ = model.to(dtype), loop.coherence.to(dtype)
    model.router_state.relevance.fill_(0.4)
    model.router_state.logit_std.fill_(0.7)
    before, recorded = model.router_state.beta_coeff.tolist(), record_routers(model)
    with torch.no_grad():
        loop.step(model(*tokens(1, batch=4 if capacity else 1), return_trace=True)[2])

    expected = {"lifecycle/candidates": 0}
    for layer, (block, (x, routing)) in enumerate(zip(loop.layer_ids, recorded)):
        moe = model.transformer.h[block].mlp
        full_bias = torch.tensor(before[layer], dtype=dtype).clamp(-1.5, 1.5) * 0.7
        close(routing.z_biased, routing.z_clean + 0.4 * full_bias, dtype)
        experts, gates = routing.experts, routing.gates.double()
        weights = {name: p.detach().double() for name, p in moe.experts.named_parameters()}
        _, y, kept = reference.moe_layer(x.double(), experts, gates, weights, moe.capacity(len(x)))
        load = [(experts == e).sum().item() / experts.numel() for e in range(8)]
        found = reference.routing_statistics(routing.z_clean, 0.4 * full_bias, 2) | {"relevance": 0.4}
        found |= {"load_cv": pstdev(load) / fmean(load), "dropped": 1 - kept.sum().item() / kept.numel()}
        assert found["js"] > 1e-3 and (capacity is None or found["dropped"] > 0)
        expected |= {f"routing/L{block}/{name}": value for name, value in found.items()}
        p, q = (z.softmax(-1) for z in (routing.z_clean, routing.z_biased))
        close(compute_js_divergence(p, q), found["js"], dtype)
        for k, name in ((1, "flip"), (2, "flip_set")):
            close(compute_flip_rate(p, q, k), found[name], dtype)
        at_full_strength = reference.routing_statistics(routing.z_clean, full_bias, 2)[signal]
        close(model.router_state.disagreement[layer], at_full_strength, dtype)

        phi = reference.phi(y, experts, gates, kept, 8, rule == "leave_one_out")
        seen = [p for p in phi if p == p]
        counts = [(kept & (experts == e)).sum().item() for e in range(8)]
        mean_phi = sum(n * p for n, p in zip(counts, phi) if n) / sum(counts)
        found = {"layer": mean_phi, "phi_slow_min": min(seen), "phi_slow_max": max(seen), "starving": mean_phi < 0.35}
        expected |= {f"coherence/L{block}/{name}": value for name, value in found.items()}

        drift = [0.1 * (p - 0.3) if p == p else 0 for p in phi]
        beta = [max(-1.5, min(1.5, b + d)) for b, d in zip(before[layer], drift)]
        found = {"mean": fmean(beta), "std": pstdev(beta), "min": min(beta), "max": max(beta)}
        found |= {"spread": max(beta) - min(beta), "clamped": sum(abs(b) == 1.5 for b in beta) / 8}
        assert found["clamped"] > 0
        expected |= {f"beta/L{block}/{name}": value for name, value in found.items()}
        of_experts = {"load": load, "beta": beta, **{f"phi_{clock}": phi for clock in ("fast", "mid", "slow")}}
        expected |= {f"expert/L{block}_E{e}/{name}": row[e] for name, row in of_experts.items() for e in range(8)}
    values = loop.read()
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        close(values[name], value, dtype)


def test_js_is_accurate_where_distributions_nearly_agree_and_at_both_ends_of_its_range():
    z, tiny = torch.randn(200, 8), 1e-3 * torch.randn(8)
    exact = compute_js_divergence(z.double().softmax(-1), (z.double() + tiny.double()).softmax(-1)).item()
    assert 1e-9 < exact < 1e-6
    assert compute_js_divergence(z.softmax(-1), (z + tiny).softmax(-1)).item() == pytest.approx(exact, rel=2e-3)
    assert compute_js_divergence(torch.eye(2), torch.eye(2)) == 0
    assert compute_js_divergence(torch.eye(2), torch.eye(2).flip(0)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("signal", ["js", "overlap"])
def test_reach_is_never_exceeded_and_attained_and_bias_needed_is_its_inverse(signal):
    measure = {"js": reference.js_divergence, "overlap": reference.overlap}[signal]
    for bound in (0.3, 1.42, 3.96):
        largest = reach(bound)[signal]
        p = (3 * torch.randn(500, 4, dtype=torch.float64)).softmax(-1)
        q = (p.log() + bound * (2 * torch.rand(500, 4, dtype=torch.float64) - 1).sign()).softmax(-1)
        assert max(measure(*pair) for pair in zip(p.tolist(), q.tolist())) <= largest + 1e-12
        ends = [reference.softmax([sign * bound / 2, -sign * bound / 2]) for sign in (-1, 1)]
        assert measure(*ends) == pytest.approx(largest)
        assert bias_needed(signal, largest) == pytest.approx(bound)
    assert reach(0.3)[signal] == pytest.approx({"js": 0.011, "overlap": 0.149}[signal], abs=5e-4)
    assert bias_needed(signal, {"js": 0.7, "overlap": 1.0}[signal]) == math.inf


# Router


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gates", ["biased", "clean"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_gates_are_the_softmax_of_the_chosen_or_of_all_experts(top_k, gates, norm):
    router = ChronoRouter(16, 8, top_k, ChronoConfig(router=True, gates=gates), norm_topk_prob=norm)
    bias = 2 * torch.randn(8)
    routing = router(3 * torch.randn(50, 16), RouterBias(bias, 0.5 * FULL))
    torch.testing.assert_close(routing.z_biased, routing.z_clean + 0.5 * bias)
    assert torch.equal(routing.experts, routing.z_biased.topk(top_k).indices)
    every = (routing.z_clean if gates == "clean" else routing.z_biased).softmax(-1).gather(-1, routing.experts)
    torch.testing.assert_close(routing.gates, every / every.sum(-1, keepdim=True) if norm else every)


def test_relevance_per_token_depends_on_that_token_alone_and_has_no_gradient():
    x, bias = torch.randn(60, 16), torch.linspace(-1.2, 1.2, 8)
    router = ChronoRouter(16, 8, 2, chrono(bridge_scope="token", bridge_threshold=0.05))
    per_token = router(x, RouterBias(bias, FULL))
    pairs = [(reference.softmax(z.tolist()), reference.softmax((z + bias).tolist())) for z in per_token.z_clean]
    expected = torch.tensor([[min(1.0, max(0.0, 1.5 - 10 * reference.js_divergence(*pair)))] for pair in pairs])
    torch.testing.assert_close(per_token.relevance, expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > expected.min() + 0.1
    router.config = chrono()
    given = router(x, RouterBias(bias, per_token.relevance.detach()))
    gradients = [torch.autograd.grad(r.z_biased.square().sum(), router.w_g.weight)[0] for r in (per_token, given)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("norm", [True, False])
def test_the_probes_gate_mass_follows_the_routers_gates(norm):
    router = ChronoRouter(16, 8, 3, ChronoConfig(router=True), norm_topk_prob=norm)
    x = 2 * torch.randn(40, 16)
    biased, clean = (router(x, RouterBias(bias, FULL)) for bias in (2 * torch.randn(8), torch.zeros(8)))
    used, without = ([dict(zip(e, g)) for e, g in zip(r.experts.tolist(), r.gates.tolist())] for r in (biased, clean))
    moved = sum(max(0.0, u.get(e, 0.0) - w.get(e, 0.0)) for u, w in zip(used, without) for e in range(8)) / 40
    assert moved > 0.1
    assert gate_mass_moved(router, biased).item() == pytest.approx(moved, rel=1e-5)


def test_router_noise_is_in_training_only_and_not_in_logit_std():
    """beta_eff is in units of logit_std. With noise in it, beta would act too strongly in evaluation."""
    model, loop = build(chrono(), use_noisy_top_k=True)
    first = model.transformer.h[0].mlp.router
    with torch.no_grad():
        first.w_noise.weight.normal_()
    recorded = record_routers(model)
    loop.step(model(*tokens(0), return_trace=True)[2])
    x, routing = recorded[0]
    expected = first.w_g(x).var(-1).mean().sqrt()
    torch.testing.assert_close(model.router_state.logit_std[0], expected.detach())
    assert routing.z_clean.var(-1).mean().sqrt() > 1.2 * expected
    model.eval()
    assert first(x).noise_free is None
    torch.testing.assert_close(first(x).z_clean, first.w_g(x))


# Dtypes


@pytest.mark.parametrize("full_precision", [False, True])
def test_full_precision_computes_logits_in_float32_under_autocast(full_precision):
    router = ChronoRouter(16, 8, full_precision=full_precision)
    x = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = router(x).z_clean
    assert z.dtype == torch.float32
    assert torch.equal(z, router(x).z_clean) == full_precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_outputs_are_exact_to_float32(dtype):
    layer = moe_layer(torch.float32, n_embd=64)
    plan, weights = plan_dispatch(torch.randint(5, (3000, 2)), 5), torch.rand(2, 6000)
    with torch.autocast("cpu", dtype=dtype):
        y, sums = layer.experts(torch.randn(6000, 64), plan, weights)
    assert y.dtype == dtype and sums.dtype == torch.float32
    for e in range(5):
        mine = plan.experts == e
        exact = weights[:, mine].double() @ y[mine].double()
        assert (sums[:, e] - exact).norm() < 1e-5 * exact.norm()


def test_a_model_in_bfloat16_adds_beta_in_full_and_is_observed_in_float32():
    model, loop = build(chrono(bridge=False), beta=1.0)
    model.router_state.relevance.zero_()  # left by a run with the bridge on; has no effect while it is off
    beta = model.router_state.beta_coeff.clone()
    recorded = record_routers(model.bfloat16())
    assert torch.equal(model.router_state.beta_coeff, beta)
    assert all(b.dtype in (torch.float32, torch.int64) for b in loop.coherence.half().buffers())
    trace = model(*tokens(1), return_trace=True)[2]
    _, routing = recorded[0]
    assert routing.z_biased.dtype == trace.output.dtype == trace.gated_output.dtype == torch.float32
    added = (routing.z_biased - routing.z_clean).detach()
    torch.testing.assert_close(added, model.router_state.compute_beta_eff()[:1].expand_as(added))
    loop.step(trace)
    assert loop.coherence.phi("slow").abs().max() > 0
    assert model.double().router_state.beta_coeff.dtype == torch.float64
