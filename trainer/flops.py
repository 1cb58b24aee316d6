"""How much of a device's peak a step uses: model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import torch

from model import GPT

# Dense bfloat16 and float16 peaks, FLOP/s, from the makers' data sheets, by a part of the device's name.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(model: GPT) -> int:
    """Multiplications and additions of forward and backward for one token, with the experts that it goes through.

    Two for each weight in forward and four in backward, and the attention's products over the whole context.
    """
    c = model.config
    weights = model.num_active_params() - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def peak(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that the device can reach at most in a 16-bit dtype; None where that is not known."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
