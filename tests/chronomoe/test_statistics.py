"""What the forward and the loop measure, against loops over tokens and experts (tests/reference.py)."""

import math

import pytest
import torch

from chronomoe import (
    ChronoConfig,
    ChronoRouter,
    RouterBias,
    compute_flip_rate,
    compute_js_divergence,
    compute_relevance,
)
from chronomoe.bridge import bias_needed, reach
from comparison.probe import gate_mass_moved
from model import GPTConfig, MOELayer
from ops.dispatch import plan_dispatch
from tests.helpers import reference
from tests.helpers.models import build, chrono, draw_beta, tokens

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)


def close(ours, theirs, dtype):
    torch.testing.assert_close(
        torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64),
        rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-2,
    )  # fmt: skip


def layer_inputs(model, idx):
    """The hidden states that reach each MoE layer [N, D]."""
    caught = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().flatten(0, 1)))
        for block in model.transformer.h
        if isinstance(block.mlp, MOELayer)
    ]
    trace = model(*idx, return_trace=True)[2]
    for hook in hooks:
        hook.remove()
    return caught, trace


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("capacity", [None, 0.75])
@pytest.mark.parametrize("rule", ["mixture", "leave_one_out"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_agrees_with_the_slow_version(dtype, rule, capacity, bias):
    config = chrono(bridge=False, reference=rule, k_max=2.0, eta=0.1, tau=0.3)
    model, loop = build(config, n_embd=16, train_capacity=capacity, bias=bias)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():  # spread the logits, and biases away from zero
            p.add_(0.3 * torch.randn(p.shape))
    model, _ = model.to(dtype), loop.coherence.to(dtype)
    draw_beta(model, size=1.5)
    inputs, trace = layer_inputs(model, tokens(1, batch=4))
    beta_before = model.router_state.beta_coeff.clone()
    bias_used = model.router_state.compute_beta_eff()
    loop.step(trace)
    values = loop.read()

    for layer, block in enumerate(loop.layer_ids):
        moe = model.transformer.h[block].mlp
        with torch.no_grad():
            z_clean, _ = moe.router.clean_logits(inputs[layer])
            routing = moe.router(inputs[layer], RouterBias(bias_used[layer], torch.ones((), dtype=dtype)))
        expected = reference.routing_statistics(z_clean, bias_used[layer], 2)
        assert expected["js"] > 0.01
        assert values[f"routing/L{block}/flip"] == pytest.approx(expected.pop("flip"), abs=1e-9)
        assert values[f"routing/L{block}/flip_set"] == pytest.approx(expected.pop("flip_set"), abs=1e-6)
        for name, value in expected.items():
            close(values[f"routing/L{block}/{name}"], value, dtype)

        weights = {name: p.detach().double() for name, p in moe.experts.named_parameters()}
        gates = routing.gates.double()
        slots = moe.capacity(len(z_clean))
        x = inputs[layer].double()
        _, y, kept = reference.moe_layer(x, routing.experts, gates, weights, slots)
        assert capacity is None or not kept.all()
        phi = reference.phi(y, routing.experts, gates, kept, 8, rule == "leave_one_out")
        dropped = 1 - kept.sum().item() / kept.numel()
        assert values[f"routing/L{block}/dropped"] == pytest.approx(dropped, abs=1e-6)
        for e in range(8):
            load = (routing.experts == e).sum().item() / routing.experts.numel()
            assert values[f"expert/L{block}_E{e}/load"] == pytest.approx(load, abs=1e-7)
            if math.isnan(phi[e]):
                assert values[f"expert/L{block}_E{e}/phi_slow"] is None
                moved = 0.0
            else:
                for clock in ("fast", "mid", "slow"):
                    close(values[f"expert/L{block}_E{e}/phi_{clock}"], phi[e], dtype)
                moved = 0.1 * (phi[e] - 0.3)
            after = max(-2.0, min(2.0, beta_before[layer, e].item() + moved))
            close(values[f"expert/L{block}_E{e}/beta"], after, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_js_and_flip_agree_with_loops_over_random_distributions(dtype):
    torch.manual_seed(0)
    p, q = (torch.randn(2, 50, 6, dtype=dtype) * 2).softmax(-1)
    expected = sum(reference.js_divergence(a, b) for a, b in zip(p.tolist(), q.tolist())) / 50
    close(compute_js_divergence(p, q), expected, dtype)
    for k in (1, 3):
        top = [[sorted(range(6), key=lambda e: -row[e])[:k] for row in d.tolist()] for d in (p, q)]
        changed = sum(1 - len(set(a) & set(b)) / k for a, b in zip(*top)) / 50
        close(compute_flip_rate(p, q, k), changed, torch.float32)


def test_js_is_exact_where_distributions_nearly_or_fully_agree():
    z = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    tiny = 1e-3 * torch.randn(8, generator=torch.Generator().manual_seed(2))
    p, q = z.softmax(-1), (z + tiny).softmax(-1)
    expected = compute_js_divergence(z.double().softmax(-1), (z.double() + tiny.double()).softmax(-1))
    assert 1e-9 < expected < 1e-6
    assert compute_js_divergence(p, q).item() == pytest.approx(expected.item(), rel=2e-3)
    assert compute_js_divergence(p, p) == 0
    ends = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert compute_js_divergence(*ends).item() == pytest.approx(math.log(2))


def test_gates_are_the_renormalised_top_k_and_sum_to_one():
    router = ChronoRouter(16, 8, top_k=3, config=ChronoConfig(router=True))
    x = torch.randn(100, 16)
    bias = RouterBias(torch.randn(8), torch.ones(()))
    routing = router(x, bias)
    full = routing.z_biased.softmax(-1)
    top = full.gather(-1, routing.experts)
    torch.testing.assert_close(routing.gates, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(100))
    assert torch.equal(routing.experts, full.topk(3).indices)


def test_clean_gates_weigh_the_biased_choice_by_clean_logits():
    router = ChronoRouter(16, 8, top_k=2, config=ChronoConfig(router=True, gates="clean"))
    x, bias = torch.randn(50, 16), RouterBias(3 * torch.randn(8), torch.ones(()))
    routing = router(x, bias)
    assert torch.equal(routing.experts, (routing.z_clean + bias.beta_eff).topk(2).indices)
    torch.testing.assert_close(routing.gates, routing.z_clean.gather(-1, routing.experts).softmax(-1))


@pytest.mark.parametrize("gates", ["biased", "clean"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_gates_not_normalised_over_the_top_k_are_the_full_softmax_at_the_chosen(top_k, gates):
    config = ChronoConfig(router=True, gates=gates)
    router = ChronoRouter(16, 8, top_k, config, norm_topk_prob=False)
    routing = router(3 * torch.randn(50, 16), RouterBias(2 * torch.randn(8), torch.ones(())))
    weighed_by = routing.z_clean if gates == "clean" else routing.z_biased
    assert torch.equal(routing.experts, routing.z_biased.topk(top_k).indices)
    torch.testing.assert_close(routing.gates, weighed_by.softmax(-1).gather(-1, routing.experts))
    assert top_k == 8 or (routing.gates.sum(-1) < 1).all()


@pytest.mark.parametrize("gates", ["biased", "clean"])
@pytest.mark.parametrize("norm", [True, False])
def test_with_one_expert_per_token_the_cross_entropy_trains_the_router_only_by_unnormalised_gates(norm, gates):
    model, _ = build(chrono(gates=gates), top_k=1, norm_topk_prob=norm, use_aux_loss=False, use_router_z_loss=False)
    draw_beta(model)
    model(*tokens(0))[1].backward()
    for block in model.config.moe_blocks:
        gradient = model.transformer.h[block].mlp.router.w_g.weight.grad
        assert (gradient == 0).all() if norm else (gradient.abs().amax(1) > 0).any()


@pytest.mark.parametrize("norm", [True, False])
def test_the_probes_gate_mass_follows_the_routers_gates(norm):
    router = ChronoRouter(16, 8, 3, ChronoConfig(router=True), norm_topk_prob=norm)
    x = 2 * torch.randn(40, 16)
    biased, clean = (router(x, RouterBias(bias, torch.ones(()))) for bias in (2 * torch.randn(8), torch.zeros(8)))
    used, without = ([dict(zip(e, g)) for e, g in zip(r.experts.tolist(), r.gates.tolist())] for r in (biased, clean))
    moved = sum(max(0.0, u.get(e, 0.0) - w.get(e, 0.0)) for u, w in zip(used, without) for e in range(8)) / 40
    assert moved > 0.1
    assert gate_mass_moved(router, biased).item() == pytest.approx(moved, rel=1e-5)


def test_router_noise_is_in_training_only():
    router = ChronoRouter(16, 8, noisy=True)
    x = torch.randn(20, 16)
    assert not torch.equal(router(x).z_clean, router(x).z_clean)
    router.eval()
    assert torch.equal(router(x).z_clean, router(x).z_clean)
    torch.testing.assert_close(router(x).z_clean, router.w_g(x))


def test_logit_std_is_that_of_the_logits_without_noise():
    """beta_eff is in units of logit_std: with the noise in it, beta would act too strongly in evaluation."""
    model, loop = build(chrono(), use_noisy_top_k=True)
    for block in loop.layer_ids:
        with torch.no_grad():
            model.transformer.h[block].mlp.router.w_noise.weight.normal_()
    first = model.transformer.h[0].mlp  # later layers get other hidden states from a first layer with noise
    inputs, trace = layer_inputs(model, tokens(0))
    loop.step(trace)
    z = first.router.w_g(inputs[0]).detach()
    expected = z.var(-1).mean().sqrt()
    torch.testing.assert_close(model.router_state.logit_std[0], expected)
    noisy = first.router(inputs[0]).z_clean.detach()
    assert noisy.var(-1).mean().sqrt() > 1.2 * expected
    model.eval()
    assert first.router(inputs[0]).noise_free is None
    torch.testing.assert_close(first.router(inputs[0]).z_clean, z)


def test_relevance_falls_linearly_from_threshold_to_three_times_it():
    seen = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    torch.testing.assert_close(compute_relevance(seen, 0.2), expected)


def test_reach_is_never_exceeded_and_is_attained():
    generator = torch.Generator().manual_seed(0)
    for bound in (0.3, 1.42, 3.96):
        largest = reach(bound)
        p_clean = (3 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)).softmax(-1)
        bias = bound * (2 * torch.rand(4000, 4, generator=generator, dtype=torch.float64) - 1).sign()
        q = (p_clean.log() + bias).softmax(-1)
        assert max(compute_js_divergence(a[None], b[None]) for a, b in zip(p_clean, q)) <= largest["js"] + 1e-12
        half = torch.tensor([[-bound, bound]], dtype=torch.float64) / 2
        attained = compute_js_divergence(half.softmax(-1), (-half).softmax(-1))
        assert attained.item() == pytest.approx(largest["js"])
    assert reach(0.3)["js"] == pytest.approx(0.011, abs=5e-4)
    assert reach(0.3)["overlap"] == pytest.approx(0.149, abs=5e-4)
    assert bias_needed("js", 0.2) == pytest.approx(1.42, abs=0.01)
    assert bias_needed("js", 0.6) == pytest.approx(3.96, abs=0.01)
    assert bias_needed("js", 0.7) == math.inf


def test_logit_std_ignores_a_shift_common_to_a_tokens_experts():
    model, loop = build(chrono())
    trace = model(*tokens(0), return_trace=True)[2]
    for block in loop.layer_ids:
        router = model.transformer.h[block].mlp.router
        logits = router.clean_logits
        router.clean_logits = lambda x, logits=logits: (logits(x)[0] + 5 * x[:, :1], None)
    shifted = model(*tokens(0), return_trace=True)[2]
    torch.testing.assert_close(trace.logit_var[0], shifted.logit_var[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_sums_of_outputs_are_as_exact_as_without(dtype):
    """Of the outputs that were computed: what 16 bits cost those is no matter of the sums."""
    torch.manual_seed(6)
    layer = MOELayer(GPTConfig(n_embd=64, n_head=1, n_exp=4, top_k=2, bias=True, chrono=chrono()))
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.1)
    plan = plan_dispatch(torch.randint(4, (3000, 2)), 4)
    weights = torch.rand(2, 6000)
    with torch.autocast("cpu", dtype=dtype):
        y, sums = layer.experts(torch.randn(6000, 64), plan, weights)
    assert y.dtype == dtype and sums.dtype == torch.float32
    for e in range(4):
        mine = plan.experts == e
        close(sums[:, e], weights[:, mine].double() @ y[mine].double(), torch.float32)


def test_a_model_in_bfloat16_is_observed_in_float32():
    model, loop = build(chrono())
    model.bfloat16()
    trace = model(*tokens(1), return_trace=True)[2]
    assert trace.output.dtype == trace.gated_output.dtype == torch.float32
    loop.step(trace)
    assert loop.coherence.phi("slow").abs().max() > 0
