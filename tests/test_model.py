"""Initial weights, capacity and FLOPs of the model."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import build, moe_layer
from trainer.flops import flops_per_token, peak, peak_of


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


def test_capacity_follows_the_routers_current_top_k():
    """comparison/probe.py evaluates with another top_k. The configured capacity would drop most slots."""
    moe = moe_layer(torch.float32, n_exp=8, eval_capacity=1.25).eval()
    for top_k, slots in ((1, 10), (2, 20), (8, 80)):
        moe.router.top_k = top_k
        assert moe.capacity(64) == slots
        routing, kept, *_ = moe(torch.randn(2, 32, 16), None, False)[1]
        assert routing.tokens_per_expert.sum() == 64 * top_k
    assert torch.equal(kept, routing.tokens_per_expert)  # each expert gets all 64 tokens and has room for 80


@pytest.mark.parametrize("experts", [dict(n_exp=1), dict(n_exp=8, top_k=2, stride=2), dict(n_exp=4, top_k=1, stride=1)])
def test_flops_per_token_are_those_of_the_matrix_products(experts):
    model, _ = build(block_size=32, **experts)
    idx = torch.randint(64, (4, 32))
    # torch counts no FLOPs of its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)
    forward = counter.get_total_flops() / idx.numel()
    assert flops_per_token(model) == pytest.approx(3 * forward, rel=0.01)  # layer norms are below 1%
    assert peak(torch.device("cpu"), "float32") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
        *[("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA A10", 125e12)],
        *[(f"NVIDIA {name}", None) for name in ("L40", "RTX A1000", "GeForce RTX 3090 Ti", "A10G", "GH200 480GB")],
    ],
)
def test_peak_is_that_of_the_named_device_alone(name, expected):
    assert peak_of(name) == expected
