"""Forward is pure, measuring changes nothing, and routing is causal."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import model as model_module
from chronomoe import ChronoConfig
from chronomoe.fuse import fusion
from ops.cross_entropy import linear_cross_entropy
from tests.helpers import models
from tests.helpers.models import adamw, assert_same, build, chrono, loop_state, state_of, tokens, train_step

CONFIG = dict(eta=0.1, bridge_threshold=0.01)


def train(config, steps=6, parts=1, logged=lambda step: True, prepare=lambda model, loop: model, **changes):
    """Train a small model. Returns its loop, and all state with the losses. prepare: returns what runs forward."""
    model, loop = build(config, **changes)
    forward, optimizer, losses = prepare(model, loop), adamw(model), []
    torch.manual_seed(7)
    for step in range(steps):
        batches = list(zip(*(x.chunk(parts) for x in tokens(step))))
        losses.append(train_step(model, loop, optimizer, batches, forward, logged=logged(step)))
    return loop, state_of(model, loop) | {"losses": torch.stack(losses)}


@pytest.mark.parametrize("training", [True, False])
def test_forward_writes_no_state(training):
    model, loop = build(chrono(), beta=1.0)
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
    options = dict(steps=1 if aux_loss else 12, beta=0.5, use_aux_loss=aux_loss)
    (whole, _), (in_parts, _) = (train(config, parts=parts, **options) for parts in (1, 4))
    torch.testing.assert_close(loop_state(in_parts), loop_state(whole), rtol=0, atol=1e-5)
    assert in_parts.read() == pytest.approx(whole.read(), abs=1e-5)
    assert whole.router_state.relevance.min() < 1


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "use_noisy_top_k": True}, {"train_capacity": 1.0}])
def test_measuring_and_proposing_prunes_change_nothing_and_with_all_steps_off_neither_happens(changes):
    every_expert = dict(prune_phi=1.0, prune_min_tokens=0, prune_min_updates=0)  # is a prune candidate
    loop, watched = train(ChronoConfig(router=True, coherence=True, lifecycle=True, **every_expert), **changes)
    off, unwatched = train(ChronoConfig(), **changes)
    assert loop.coherence.step == 6 and len(loop.report()) == 16 and off.report() == []
    assert torch.equal(watched["losses"], unwatched["losses"])
    assert_same(loop_state(off), loop_state(build(**changes)[1]))
    assert not torch.equal(watched["losses"], train(chrono(eta=0.5), **changes)[1]["losses"])


@pytest.mark.parametrize("changes", [{}, {"bridge_scope": "token", "bridge_signal": "overlap"}, {"bridge": False}])
def test_the_interval_between_logged_steps_does_not_change_the_state(changes):
    which_steps = (lambda step: True, lambda step: False, lambda step: step % 2 == 1)
    runs = [train(chrono(**CONFIG | changes), logged=logged)[1] for logged in which_steps]
    for run in runs[1:]:
        assert_same(run, runs[0])
    assert (runs[0]["router.beta_coeff"] != 0).any()


@pytest.mark.parametrize("signal", ["coherence", "first_order", "reap"])
def test_activation_checkpointing_gives_the_same_bits(signal):
    def recompute(model, loop):
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return model

    config = chrono(signal=signal, **CONFIG)
    plain = train(config, beta=0.3, dropout=0.1)[1]
    assert_same(train(config, prepare=recompute, beta=0.3, dropout=0.1)[1], plain)


@pytest.mark.parametrize("signal", ["coherence", "first_order", "reap"])
def test_model_and_loop_compiled_in_one_graph_each_train_as_eager_ones_do(signal, monkeypatch):
    def compiled(model, loop):
        return torch.compile(model, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(model_module, "linear_cross_entropy", partial(linear_cross_entropy, max_logits=64 * 50))
    options = dict(steps=3, beta=0.3, n_layer=2)
    config = chrono(signal=signal, **CONFIG)
    loop, eager = train(config, **options)
    with fusion("aot_eager"), torch._dynamo.config.patch(capture_scalar_outputs=True):
        other, found = train(config, prepare=compiled, **options)
    torch.testing.assert_close(found["losses"], eager["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loop_state(other), loop_state(loop), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_dense_model_with_auxiliary_losses_can_be_compiled():
    model, _ = build(n_exp=1, n_layer=1)
    losses = [
        forward(*tokens(0), return_trace=True, return_logits=False)[1] for forward in (model, torch.compile(model))
    ]
    gradients = [torch.autograd.grad(loss, model.transformer.wte.weight)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


SIGNALS = [{"signal": name} for name in ("first_order", "reap", "walk")]


@pytest.mark.parametrize(
    "changes", [{}, {"bridge_scope": "token", "use_noisy_top_k": True, "train_capacity": 1.0}, *SIGNALS]
)
def test_fused_functions_are_one_graph_each_and_compute_what_they_do_eagerly(changes):
    """Layer, statistics and loop. All layers share a graph, and a logged step has the statistics' graph of any step."""
    model_changes = {k: v for k, v in changes.items() if k not in ("bridge_scope", "signal")}
    config = chrono(**CONFIG | {k: v for k, v in changes.items() if k not in model_changes})

    def grouped(model, loop):
        for block in model.config.moe_blocks:
            model.transformer.h[block].mlp.experts.use_grouped_mm = True
        return model

    options = dict(steps=3, beta=0.3, n_layer=8, prepare=grouped, logged=lambda step: step == 1) | model_changes
    loop, eager = train(config, **options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    with fusion(backend):
        other, found = train(config, **options)
    assert not counters["graph_break"]
    assert len(graphs) == 4  # layer, two kinds of sums, loop
    torch.testing.assert_close(found["losses"], eager["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loop_state(other), loop_state(loop), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    train(config, **options)
    assert len(graphs) == 4  # outside of the block nothing is compiled


@pytest.mark.parametrize("scope", ["batch", "token"])
@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_and_other_sequences_change_nothing_at_earlier_positions(scope, training):
    model, loop = build(chrono(bridge_scope=scope, bridge_threshold=0.005, k_max=3.0), beta=1.0)
    model.train(training)
    loop.step(model(*tokens(5), return_trace=True)[2])
    assert scope == "token" or model.router_state.relevance.max() < 1
    idx, targets = tokens(1, batch=4)
    other = idx.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 64
    other[1:] = (other[1:] + 7) % 64
    recorded = models.record_routers(model)
    logits, other_logits = (model(x, targets)[0] for x in (idx, other))
    torch.testing.assert_close(other_logits[0, :10], logits[0, :10], rtol=0, atol=2e-6)
    assert not torch.allclose(other_logits[0, 10:], logits[0, 10:])
    for name in ("z_biased", "gates"):
        of_layers = [getattr(routing, name).view(4, 16, -1)[0, :10] for _, routing in recorded]
        for earlier in zip(of_layers[:2], of_layers[2:]):
            torch.testing.assert_close(*earlier, rtol=0, atol=2e-6)
