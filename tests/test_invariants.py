"""Forward is pure, watching changes nothing, only differences of beta route, routing is causal."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import model as model_module
from chronomoe import ChronoConfig, RouterBias
from model import MOELayer
from ops.cross_entropy import linear_cross_entropy
from tests.helpers.models import adamw, build, chrono, draw_beta, loop_state, tokens, train_step


def state_of(model, loop):
    return {name: value.clone() for name, value in model.state_dict().items()} | loop_state(loop)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_forward_writes_no_state(training):
    model, loop = build(chrono())
    draw_beta(model)
    model.train(training)
    before = state_of(model, loop)
    first = model(*tokens(0), return_trace=True)
    second = model(*tokens(0), return_trace=True)
    model.generate(tokens(0)[0][:2, :4], 3)
    assert_same(before, state_of(model, loop))
    assert torch.equal(first[0], second[0])
    for name, value in first[2].present().items():
        assert torch.equal(value, second[2].present()[name]), name


@pytest.mark.parametrize("aux_loss", [True, False])
def test_micro_batches_and_one_large_batch_move_the_loop_alike(aux_loss):
    """One step with any loss; many steps without the auxiliary loss, which is a product of means per micro-batch."""
    config = chrono(bridge_threshold=2e-4, k_max=2.0, eta=0.05)
    runs = []
    for parts in (1, 4):
        model, loop = build(config, use_aux_loss=aux_loss)
        draw_beta(model, size=0.5)
        optimizer = adamw(model)
        for step in range(1 if aux_loss else 12):
            x, y = tokens(step, batch=8)
            train_step(model, loop, optimizer, list(zip(x.chunk(parts), y.chunk(parts))))
        runs.append((loop_state(loop), loop.read()))
    (whole, read_whole), (parts, read_parts) = runs
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-5)
    for name, value in read_whole.items():
        assert read_parts[name] == pytest.approx(value, abs=1e-5), name
    assert whole["router.relevance"].min() < 1  # the bridge had something to do


def losses_of(config, steps=6, **changes):
    model, loop = build(config, **changes)
    optimizer = adamw(model)
    torch.manual_seed(7)
    return [train_step(model, loop, optimizer, [tokens(step)]) for step in range(steps)], loop


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "use_noisy_top_k": True}, {"train_capacity": 1.0}])
def test_watching_changes_nothing(changes):
    watched, loop = losses_of(ChronoConfig(router=True, coherence=True, lifecycle=True), **changes)
    assert loop.coherence.step == 6
    assert watched == losses_of(ChronoConfig(), **changes)[0]
    # and the closed loop does change something
    assert watched != losses_of(chrono(eta=0.5), **changes)[0]


def test_a_run_repeats_bit_for_bit_from_its_seed():
    changes = {"dropout": 0.1, "use_noisy_top_k": True}
    (first, loop), (second, again) = losses_of(chrono(eta=0.1), **changes), losses_of(chrono(eta=0.1), **changes)
    assert first == second
    assert_same(loop_state(loop), loop_state(again))


def test_recomputation_gives_the_same_bits():
    config = chrono(eta=0.1, bridge_threshold=0.01)
    runs = []
    for recompute in (False, True):
        model, loop = build(config, dropout=0.1)
        draw_beta(model, size=0.3)
        if recompute:
            for block in model.transformer.h:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer = adamw(model)
        torch.manual_seed(5)
        losses = [train_step(model, loop, optimizer, [tokens(step)]) for step in range(4)]
        runs.append((losses, state_of(model, loop)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_compiled_without_graph_breaks_it_trains_as_eager_does(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)
    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, largest=64 * 50))
    config = chrono(eta=0.1, bridge_threshold=0.01)
    runs = []
    for compiled in (False, True):
        model, loop = build(config, n_layer=2)
        draw_beta(model, size=0.3)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = adamw(model)
        without_logits = partial(forward, return_logits=False)
        losses = [train_step(model, loop, optimizer, [tokens(step)], without_logits).item() for step in range(3)]
        runs.append((losses, loop_state(loop)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-5, atol=1e-5)


def test_a_constant_added_to_a_layers_beta_routes_nothing():
    model, _ = build(chrono(bridge=False, k_max=10.0))
    draw_beta(model)
    router = model.transformer.h[0].mlp.router
    x = torch.randn(200, 32)
    before = router(x, model.router_state.layer_biases()[0])
    model.router_state.beta_coeff += 2.5
    after = router(x, model.router_state.layer_biases()[0])
    assert torch.equal(before.experts, after.experts)
    torch.testing.assert_close(after.gates, before.gates, rtol=0, atol=1e-6)
    # where the clamp acts it does: the difference is gone
    model.router_state.beta_coeff += 100
    unbiased = router(x, RouterBias(torch.zeros(8), torch.ones(())))
    torch.testing.assert_close(router(x, model.router_state.layer_biases()[0]).gates, unbiased.gates)


@pytest.mark.parametrize("scope", ["batch", "token"])
@pytest.mark.parametrize("training", [True, False])
def test_routing_is_causal(scope, training):
    """Later tokens and other sequences move no earlier token's logits, gates or outputs."""
    model, loop = build(chrono(bridge_scope=scope, bridge_threshold=0.005, k_max=3.0))
    draw_beta(model)
    model.train(training)
    loop.step(model(*tokens(5), return_trace=True)[2])
    assert scope == "token" or model.router_state.relevance.max() < 1
    seen = {}
    for block in loop.layer_ids:
        moe = model.transformer.h[block].mlp
        moe.router.register_forward_hook(lambda _, args, out, key=block: seen.__setitem__(key, out))

    idx, targets = tokens(1, batch=4)
    logits = model(idx, targets)[0]
    routed = {block: (r.z_biased.view(4, 16, -1), r.gates.view(4, 16, -1)) for block, r in seen.items()}
    other = idx.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 64
    other[1:] = (other[1:] + 7) % 64
    other_logits = model(other, targets)[0]
    torch.testing.assert_close(other_logits[0, :10], logits[0, :10], rtol=0, atol=2e-6)
    assert not torch.allclose(other_logits[0, 10:], logits[0, 10:])
    for block, (z, gates) in routed.items():
        torch.testing.assert_close(seen[block].z_biased.view(4, 16, -1)[0, :10], z[0, :10], rtol=0, atol=2e-6)
        torch.testing.assert_close(seen[block].gates.view(4, 16, -1)[0, :10], gates[0, :10], rtol=0, atol=2e-6)


def test_token_scope_takes_relevance_from_each_token_alone():
    config = chrono(bridge_scope="token", bridge_threshold=0.12, k_max=5.0)
    model, _ = build(config)
    draw_beta(model, size=2.0)
    router, bias = model.transformer.h[0].mlp.router, model.router_state.layer_biases()[0]
    x = torch.randn(60, 32)
    together = router(x, bias).z_biased
    alone = torch.cat([router(row, bias).z_biased for row in x.split(1)])
    torch.testing.assert_close(together, alone)
    strength = (together - router(x, bias).z_clean) / bias.beta_eff
    assert strength.max() > strength.min() + 0.1  # tokens differ


def test_beta_is_constant_to_autograd_and_added_in_float32():
    model, _ = build(chrono())
    draw_beta(model)
    routing = model.transformer.h[0].mlp.router.bfloat16()(
        torch.randn(10, 32).bfloat16(), model.router_state.layer_biases()[0]
    )
    assert routing.z_biased.dtype == torch.float32
    difference = (routing.z_biased - routing.z_clean).detach()
    torch.testing.assert_close(difference, model.router_state.compute_beta_eff()[0].expand(10, 8))
    assert not any(buffer.requires_grad for buffer in model.router_state.buffers())


def test_loss_is_cross_entropy_alone_in_eval_mode_and_the_trace_has_all_three():
    model, _ = build(chrono(), aux_loss_weight=0.3, router_z_loss_weight=0.2)
    _, loss, trace = model(*tokens(0), return_trace=True)
    expected = trace.cross_entropy + 0.3 * trace.aux_loss + 0.2 * trace.router_z_loss
    torch.testing.assert_close(loss.detach(), expected)
    model.eval()
    _, loss, trace = model(*tokens(0), return_trace=True)
    assert torch.equal(loss.detach(), trace.cross_entropy)
    assert trace.aux_loss > 0 and trace.router_z_loss > 0


def test_moe_layers_stand_at_every_stride_th_block():
    for stride, expected in ((1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])):
        model, loop = build(stride=stride)
        assert loop.layer_ids == expected
        assert [i for i, block in enumerate(model.transformer.h) if isinstance(block.mlp, MOELayer)] == expected
