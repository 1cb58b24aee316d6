"""Measure the matmul rate of the machine, and the share of it that a training step reaches."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.step import SliceStep, recorded_calls
from benchmark.timing import Effort, Report, time_in_turns
from model import GPT, MLP, GPTConfig, MOELayer
from trainer.flops import flops_per_token

NANO_MOE = dict(n_layer=6, n_head=6, n_embd=384, block_size=1024, vocab_size=50304)
ON_GPU = {"slice": {}, "nanoMoE": NANO_MOE | {"batch_size": 12}}


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
        shapes["nanoMoE"] = ON_GPU["nanoMoE"] if device.type == "cuda" else NANO_MOE | {"batch_size": 2}
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
        for measure_on_gpu in (waits, held_memory, kernels):
            measure_on_gpu(report, device)


def waits(report: Report, device: torch.device) -> None:
    """Whether a training step waits for the GPU, and where."""
    for shape, changes in ON_GPU.items():
        step = SliceStep(device, **changes)
        for logged in (False, True):
            for _ in range(3):
                step(logged)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(logged)
            torch.cuda.set_sync_debug_mode("default")
            places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
            name = f"{shape}, with the logged fields" if logged else shape
            detail = f"{len(places)} waits, in {', '.join(sorted(set(places)))}" if places else ""
            report.checks("rates", "a training step does not wait for the GPU", [(name, not places, detail)])


def held_memory(report: Report, device: torch.device) -> None:
    """Whether the memory that is held between steps grows. The cuda tests have 1000 steps of the slice."""
    step, held = SliceStep(device, **ON_GPU["nanoMoE"]), []
    for number in range(1, 101):
        step()
        if number % 10 == 0:
            held.append(torch.cuda.memory_allocated(device))
    detail = f"{held[0]:,} bytes after 10 steps, {held[-1]:,} after 100"
    report.checks("rates", "memory held does not grow", [("nanoMoE, 100 steps", len(set(held)) == 1, detail)])


def kernels(report: Report, device: torch.device) -> None:
    """Number and time of the kernels of a training step, of the loop and of the statistics in forward."""
    for shape, changes in ON_GPU.items():
        step = SliceStep(device, **changes)
        calls = recorded_calls(step)
        step()  # the loop keeps the last trace

        def statistics_in_forward(calls=calls) -> None:
            for call in calls:
                call()

        parts: dict[str, Callable[[], object]] = {
            "step": step,
            "step with the logged fields": partial(step, logged=True),
            "the loop": partial(step.loop.step, step.loop.last, torch.zeros((), device=device)),
            "statistics in forward": statistics_in_forward,
        }
        lines: list[tuple[str, float, str]] = []
        longest: list[tuple[str, float, str]] = []
        for name, work in parts.items():
            for _ in range(3):
                work()
            torch.cuda.synchronize(device)
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                work()
                torch.cuda.synchronize(device)
            events = {e.key: e for e in profiled.key_averages() if e.self_device_time_total > 0}
            of_gpu = {key: event.self_device_time_total / 1000 for key, event in events.items()}
            if name == "step":
                most = sorted(of_gpu, key=lambda key: -of_gpu[key])[:10]
                longest = [(f"{events[key].count} x {key[:80]}", of_gpu[key], "ms") for key in most]
            lines.append((f"{name}: kernels", sum(event.count for event in events.values()), ""))
            lines.append((f"{name}: time on the GPU", sum(of_gpu.values()), "ms"))
        report.numbers("rates", f"kernels of a training step at the shape of {shape}", lines)
        report.numbers("rates", f"longest kernels of a training step at the shape of {shape}", longest)
