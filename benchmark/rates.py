"""Measure the matmul rate of the machine, and the share of it that a training step reaches."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.step import SliceStep
from benchmark.timing import Effort, Report, time_in_turns
from model import GPT, MLP, GPTConfig, MOELayer
from trainer.flops import flops_per_token

NANO_MOE = dict(n_layer=6, n_head=6, n_embd=384, block_size=1024, vocab_size=50304)


def matmul_rates(device: torch.device, effort: Effort) -> dict[str, float]:
    """FLOP/s of square matrix products, by torch in the precision of training and, on a CPU, by oneDNN."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    work: dict[str, Callable[[], object]] = {"torch.mm": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        work["oneDNN's linear"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    found = time_in_turns(work, device, Effort(min(effort.seconds, 3), effort.least, 100))
    return {name: 2 * size**3 / (statistics.median(ms) / 1000) for name, ms in found.items()}


def make_dense(model: GPT) -> None:
    """Replace each MoE layer by an MLP with as many multiplications: it is K times as wide."""
    config = model.config
    for block in model.transformer.h:
        if isinstance(block.mlp, MOELayer):
            shape = GPTConfig(n_embd=config.n_embd, n_head=config.n_head, bias=config.bias)
            block.mlp = MLP(shape)
            block.mlp.c_fc = torch.nn.Linear(config.n_embd, 4 * config.top_k * config.n_embd, bias=config.bias)
            block.mlp.c_proj = torch.nn.Linear(4 * config.top_k * config.n_embd, config.n_embd, bias=config.bias)


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Share of the matmul rate that the MoE GPT and a dense GPT with as many multiplications reach."""
    rates = matmul_rates(device, effort)
    report.numbers("rates", "matmul rate, measured", [(name, rate / 1e9, "GFLOP/s") for name, rate in rates.items()])
    rate = rates["torch.mm"]
    shapes = {"the slice": {}}
    if not quick:
        shapes["nanoMoE"] = NANO_MOE | {"batch_size": 12 if device.type == "cuda" else 2}
    for name, shape in shapes.items():
        moe = SliceStep(device, **shape)
        work = {"dense GPT": SliceStep(device, (), prepare=make_dense, **shape), "MoE GPT, all steps on": moe}
        found = time_in_turns(work, device, effort)
        flops = flops_per_token(moe.model) * moe.batch[0].numel()
        report.comparison("rates", f"training step at the shape of {name}, dense against MoE", found, flops=flops)
        lines = [
            (f"{name}: share of the matmul rate", flops / (statistics.median(ms) / 1000) / rate, "")
            for name, ms in found.items()
        ]
        lines += [("the multiplications alone", flops / rate * 1000, "ms")]
        report.numbers("rates", f"model FLOPs utilization at the shape of {name}", lines)
    if device.type == "cuda":
        measure_gpu(report, device)


def measure_gpu(report: Report, device: torch.device) -> None:
    """Kernels of the loop, synchronizations in a training step, and growth of memory over many steps."""
    step = SliceStep(device)
    for _ in range(5):
        step()
    trace, found_inf = step.loop.last, torch.zeros((), device=device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step.loop.step(trace, found_inf)
        torch.cuda.synchronize(device)
    kernels = sum(event.count for event in profiled.key_averages() if event.self_device_time_total > 0)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    before = torch.cuda.memory_allocated(device)
    for _ in range(1000):
        step()
    torch.cuda.synchronize(device)
    grown = torch.cuda.memory_allocated(device) - before
    lines = [("kernels of the loop per step", kernels, ""), ("synchronizations per step", len(caught), "")]
    lines += [("growth of memory over 1000 steps", grown, "bytes")]
    report.numbers("rates", "training step of the slice on the GPU", lines)
