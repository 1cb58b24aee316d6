"""Cost of loop and statistics by number of layers, of the layer by number of experts, and of loading batches."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmark.layer import competitors
from benchmark.scaling import Traffic
from benchmark.step import SliceStep, recorded_calls
from benchmark.timing import Effort, Report, time_in_turns
from chronomoe.fuse import fusion
from trainer.data import TokenData


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Cost by number of MoE layers, on which it should not depend, and by number of experts at a fixed K."""
    small = Effort(effort.seconds / 2, effort.least, effort.most)
    loops, forwards, operators = {}, {}, []
    for layers in (2, 4) if quick else (2, 8, 32):
        step = SliceStep(device, n_layer=2 * layers, n_embd=32, batch_size=2)
        call = next(call for call in recorded_calls(step) if call.func.__name__ == "collect_trace")
        trace = step.loop.last
        with Traffic() as of_loop:
            step.loop.step(trace)
        with Traffic() as of_statistics:
            call()
        operators += [(f"loop, L={layers}", of_loop.operators, "operators")]
        operators += [(f"statistics, L={layers}", of_statistics.operators, "operators")]
        loops[f"the loop, L={layers}"] = partial(step.loop.step, trace)
        forwards[f"statistics, L={layers}"] = call
    report.numbers("layers", "operators, without views, by number of MoE layers", operators)
    times = time_in_turns(loops, device, small)
    report.comparison("layers", "the loop by number of MoE layers (E=8, D=32)", times)
    times = time_in_turns(forwards, device, small)
    report.comparison("layers", "routing statistics by number of MoE layers (E=8, N=256)", times)
    compiled(report, device)

    by_experts, tokens = {}, 1024 if quick else 4096
    for experts in (8, 16) if quick else (8, 16, 32, 64, 128):
        work, _ = competitors(tokens, 128, experts, 2, device)
        by_experts[f"MoE layer, E={experts}"] = work["MoE layer, balanced"]
    times = time_in_turns(by_experts, device, effort)
    report.comparison("experts", f"MoE layer by number of experts (N={tokens}, D=128, K=2)", times)


def compiled(report: Report, device: torch.device) -> None:
    """Number of kernels and time of the compiled loop, if torch.compile works on this machine."""
    import torch._inductor.metrics as metrics

    lines = []
    for layers in (2, 32):
        step = SliceStep(device, n_layer=2 * layers, n_embd=32, batch_size=2)
        step()
        trace, found_inf = step.loop.last, torch.zeros((), device=device)
        metrics.reset()
        with fusion():
            try:
                with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns that its caches are off
                    step.loop.step(trace, found_inf)
            except Exception as e:
                report.info(f"\nthe loop cannot be compiled on this machine: {type(e).__name__}")
                return
            lines.append((f"the loop compiled, L={layers}", metrics.generated_kernel_count, "kernels"))
            found = time_in_turns({"loop": partial(step.loop.step, trace, found_inf)}, device, Effort(1, 7, 1000))
        lines.append((f"the loop compiled, L={layers}", statistics.median(found["loop"]), "ms"))
    report.numbers("layers", "the compiled loop by number of MoE layers", lines)


def measure_data(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Batches per second at the shapes of the slice and of nanoMoE, from a file of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for split, size in {"train": 1 << (20 if quick else 26), "val": 1 << 16}.items():
            np.random.Generator(np.random.Philox(0)).integers(256, size=size, dtype=np.uint16).tofile(
                Path(folder) / f"{split}.bin"
            )
        lines = []
        for rows, length in ((16, 128), (12, 1024)):
            data = TokenData(Path(folder), length)
            steps = itertools.count()
            work = {"batch": lambda: data.batch("train", 0, next(steps), 0, rows)}  # noqa: B023
            found = time_in_turns(work, torch.device("cpu"), Effort(min(effort.seconds, 2), effort.least, 5000))
            lines.append((f"{rows} x {length} tokens", 1000 / statistics.median(found["batch"]), "batches per second"))
    report.numbers("data", "batches from a memory-mapped file of random tokens", lines)
