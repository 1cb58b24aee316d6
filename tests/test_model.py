"""Initial weights, capacity, losses and optimizer groups of the model."""

import math

import pytest
import torch

from model import MOELayer
from tests.helpers.models import build, chrono, moe_layer, tokens


@pytest.mark.parametrize("switch", [False, True])
def test_initial_weights_have_the_deviation_of_their_scheme(switch):
    """GPT-2: 0.02. Switch Transformer: sqrt(scale / fan_in), cut off at two deviations. Residual layers: GPT-2's."""
    model, _ = build(n_embd=64, n_layer=2, bias=True, use_switch_tfm_init=switch, switch_tfm_init_scale=0.5)
    deviations = {"wte.weight": 0.02, "wpe.weight": 0.02, "c_proj.weight": 0.01, "experts.c_proj": 0.01}  # 0.02/sqrt(4)
    for name, p in model.named_parameters():
        if "bias" in name or "ln_" in name:
            assert (p == (0 if "bias" in name else 1)).all(), name
            continue
        std = next((deviations[end] for end in deviations if name.endswith(end)), None)
        cut_off = switch and std is None
        std = math.sqrt(0.5 / 64) * 0.8796 if cut_off else std or 0.02  # 0.8796: of a normal cut off at two deviations
        assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
        assert (p.abs().max() <= 2 / 0.8796 * std).item() == cut_off, name


@pytest.mark.parametrize(
    ("tokens_in_batch", "factor", "least", "capacity"),
    [(64, 1.0, 1, 16), (60, 1.0, 1, 16), (63, 1.25, 1, 20), (64, 1.25, 24, 24), (4, 1.0, 3, 3), (64, None, 4, None)],
)
def test_capacity_is_the_mean_load_times_the_factor_rounded_up_to_even(tokens_in_batch, factor, least, capacity):
    sizes = dict(n_exp=8, min_capacity=least)
    trained, evaluated = moe_layer(train_capacity=factor, **sizes), moe_layer(eval_capacity=factor, **sizes).eval()
    assert trained.capacity(tokens_in_batch) == evaluated.capacity(tokens_in_batch) == capacity
    assert trained.eval().capacity(64) is None and evaluated.train().capacity(64) is None


def test_capacity_follows_the_routers_current_top_k():
    """comparison/probe.py evaluates with another top_k. The configured capacity would drop most slots."""
    moe = moe_layer(torch.float32, n_exp=8, eval_capacity=1.25).eval()
    for top_k, slots in ((1, 10), (2, 20), (8, 80)):
        moe.router.top_k = top_k
        assert moe.capacity(64) == slots
        routing, kept, _ = moe(torch.randn(2, 32, 16), None, False)[1]
        assert routing.tokens_per_expert.sum() == 64 * top_k
    assert torch.equal(kept, routing.tokens_per_expert)  # each expert gets all 64 tokens and has room for 80


def test_auxiliary_losses_are_weighted_and_in_the_loss_in_training_only():
    model, _ = build(chrono(), aux_loss_weight=0.3, router_z_loss_weight=0.2)
    _, loss, trace = model(*tokens(0), return_trace=True)
    expected = trace.cross_entropy + 0.3 * trace.aux_loss + 0.2 * trace.router_z_loss
    torch.testing.assert_close(loss.detach(), expected)
    _, loss, trace = model.eval()(*tokens(0), return_trace=True)
    assert torch.equal(loss.detach(), trace.cross_entropy)
    assert trace.aux_loss > 0 and trace.router_z_loss > 0


def test_weight_decay_applies_to_matrices_but_not_to_biases_or_norms():
    model, _ = build(n_layer=1, bias=True)
    decayed, others = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    undecayed = {names[p] for p in others["params"]}
    assert undecayed == {name for name in names.values() if "bias" in name or "ln_" in name}
    assert {names[p] for p in decayed["params"]} == set(names.values()) - undecayed


@pytest.mark.parametrize(("stride", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_stride_th_block_is_a_moe_layer(stride, expected):
    model, loop = build(stride=stride)
    assert loop.layer_ids == expected
    assert [i for i, block in enumerate(model.transformer.h) if isinstance(block.mlp, MOELayer)] == expected
