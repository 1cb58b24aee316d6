"""Model FLOPs utilization: the share of a device's peak that a step uses (PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import re

import torch

from model import GPT

# Peaks for dense bfloat16 and float16 matmuls, FLOP/s, from data sheets, by words of the device's name.
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
    """FLOPs of forward and backward per token: multiplications and additions, with top_k experts.

    Two per weight in forward and four in backward, and attention over the whole context.
    """
    c = model.config
    weights = model.num_active_params() - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def peak(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device in a 16-bit dtype; None if unknown."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of the device with this name. A variant, such as 'RTX 3090 Ti', is another device."""
    variants = r"(?! (?:Ti|D|Laptop)\b)"
    return next((rate for words, rate in PEAKS.items() if re.search(rf"\b{words}\b{variants}", name)), None)
