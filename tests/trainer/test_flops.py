"""The FLOPs that MFU counts, against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from trainer.flops import flops_per_token, peak


@pytest.mark.parametrize("experts", [dict(), dict(n_exp=8, top_k=2, stride=2), dict(n_exp=4, top_k=1, stride=1)])
def test_flops_of_a_token_are_those_of_the_matrix_products(experts):
    config = GPTConfig(block_size=32, vocab_size=64, n_layer=4, n_head=2, n_embd=32, bias=False, **experts)
    model = GPT(config)
    idx = torch.randint(64, (4, 32))
    # torch counts no FLOPs of its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)
    forward = counter.get_total_flops() / idx.numel()
    # norms and the like are no matrix products: 64 weights of layer norms are below 1%
    assert flops_per_token(model) == pytest.approx(3 * forward, rel=0.01)


def test_an_unknown_peak_is_none():
    assert peak(torch.device("cpu"), "float32") is None
