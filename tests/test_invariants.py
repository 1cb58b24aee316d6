"""Forward is pure, measuring changes nothing, only differences of beta affect routing, and routing is causal."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import model as model_module
from chronomoe import ChronoConfig, RouterBias
from ops.cross_entropy import linear_cross_entropy
from tests.helpers.models import adamw, assert_same, build, chrono, draw_beta, loop_state, state_of, tokens, train_step

EVERY_EXPERT = dict(prune_phi=1.0, prune_min_tokens=0, prune_min_updates=0)  # is a prune candidate


def train(config, steps=6, prepare=lambda model, loop: model, beta=0.0, **changes):
    """Train a small model; returns its losses, its loop, and all state. prepare returns what runs forward."""
    model, loop = build(config, **changes)
    draw_beta(model, size=beta)
    forward, optimizer = prepare(model, loop), adamw(model)
    torch.manual_seed(7)
    losses = [train_step(model, loop, optimizer, [tokens(step)], forward).item() for step in range(steps)]
    return losses, loop, state_of(model, loop)


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
    assert_same(first[2].present(), second[2].present())


@pytest.mark.parametrize("aux_loss", [True, False])
def test_micro_batches_and_one_large_batch_leave_the_same_state(aux_loss):
    """The auxiliary loss is a product of means per micro-batch, so with it only the first step is the same."""
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
    (whole, read_whole), (in_parts, read_in_parts) = runs
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-5)
    assert read_in_parts == pytest.approx(read_whole, abs=1e-5)
    assert whole["router.relevance"].min() < 1


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "use_noisy_top_k": True}, {"train_capacity": 1.0}])
def test_measuring_and_proposing_prunes_change_nothing(changes):
    watching = ChronoConfig(router=True, coherence=True, lifecycle=True, **EVERY_EXPERT)
    losses, loop, _ = train(watching, **changes)
    assert loop.coherence.step == 6 and len(loop.report()) == 16
    assert losses == train(ChronoConfig(), **changes)[0]
    assert losses != train(chrono(eta=0.5), **changes)[0]  # the closed loop changes something


def test_a_run_repeats_bit_for_bit_from_its_seed():
    first, second = (train(chrono(eta=0.1), dropout=0.1, use_noisy_top_k=True) for _ in range(2))
    assert first[0] == second[0]
    assert_same(first[2], second[2])


def test_activation_checkpointing_gives_the_same_bits():
    def recompute(model, loop):
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return model

    config = chrono(eta=0.1, bridge_threshold=0.01)
    plain, recomputed = train(config, beta=0.3, dropout=0.1), train(config, prepare=recompute, beta=0.3, dropout=0.1)
    assert plain[0] == recomputed[0]
    assert_same(plain[2], recomputed[2])


def test_model_and_loop_compiled_in_one_graph_each_train_as_eager_ones_do(monkeypatch):
    def compiled(model, loop):
        loop.compile(backend="aot_eager")
        return torch.compile(model, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)
    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, max_logits=64 * 50))
    config = chrono(eta=0.1, bridge_threshold=0.01)
    (losses, loop, _), (others, other, _) = (
        train(config, 3, f, beta=0.3, n_layer=2) for f in (lambda m, _: m, compiled)
    )
    assert others == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(loop_state(other), loop_state(loop), rtol=1e-5, atol=1e-5)


def test_a_constant_added_to_a_layers_beta_does_not_change_routing():
    model, _ = build(chrono(bridge=False, k_max=10.0))
    draw_beta(model)
    model.router_state.relevance.zero_()  # left by a run with the bridge on; has no effect while it is off
    router, x = model.transformer.h[0].mlp.router, torch.randn(200, 32)
    before = router(x, model.router_state.layer_biases()[0])
    unbiased = router(x, RouterBias(torch.zeros(8), torch.ones(())))
    assert not torch.equal(before.experts, unbiased.experts)
    model.router_state.beta_coeff += 2.5
    after = router(x, model.router_state.layer_biases()[0])
    assert torch.equal(before.experts, after.experts)
    torch.testing.assert_close(after.gates, before.gates, rtol=0, atol=1e-6)
    model.router_state.beta_coeff += 100  # the clamp removes the differences
    torch.testing.assert_close(router(x, model.router_state.layer_biases()[0]).gates, unbiased.gates)


@pytest.mark.parametrize("scope", ["batch", "token"])
@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_and_other_sequences_change_nothing_at_earlier_positions(scope, training):
    model, loop = build(chrono(bridge_scope=scope, bridge_threshold=0.005, k_max=3.0))
    draw_beta(model)
    model.train(training)
    loop.step(model(*tokens(5), return_trace=True)[2])
    assert scope == "token" or model.router_state.relevance.max() < 1
    idx, targets = tokens(1, batch=4)
    other = idx.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 64
    other[1:] = (other[1:] + 7) % 64
    routed = []
    for block in loop.layer_ids:
        model.transformer.h[block].mlp.router.register_forward_hook(lambda _, args, out: routed.append(out))
    logits, other_logits = (model(x, targets)[0] for x in (idx, other))
    torch.testing.assert_close(other_logits[0, :10], logits[0, :10], rtol=0, atol=2e-6)
    assert not torch.allclose(other_logits[0, 10:], logits[0, 10:])
    for ours, theirs in zip(routed[:2], routed[2:]):
        for name in ("z_biased", "gates"):
            earlier = [getattr(routing, name).view(4, 16, -1)[0, :10] for routing in (ours, theirs)]
            torch.testing.assert_close(*earlier, rtol=0, atol=2e-6)
