"""The FLOPs that MFU counts, against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import build
from trainer.flops import flops_per_token, peak


@pytest.mark.parametrize("experts", [dict(n_exp=1), dict(n_exp=8, top_k=2, stride=2), dict(n_exp=4, top_k=1, stride=1)])
def test_flops_per_token_are_those_of_the_matrix_products(experts):
    model, _ = build(block_size=32, **experts)
    idx = torch.randint(64, (4, 32))
    # torch counts no FLOPs of its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)
    forward = counter.get_total_flops() / idx.numel()
    assert flops_per_token(model) == pytest.approx(3 * forward, rel=0.01)  # layer norms are below 1%


def test_an_unknown_peak_is_none():
    assert peak(torch.device("cpu"), "float32") is None
