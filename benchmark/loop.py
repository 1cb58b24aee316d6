"""The loop and the statistics against the number of layers, the layer against the number of experts, and the data."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmark.layer import competitors
from benchmark.scaling import Traffic
from benchmark.step import SliceStep, recorded_calls
from benchmark.timing import Effort, Report, in_turns
from trainer.data import TokenData


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Cost against the number of MoE layers, of which it should not depend, and of experts at a fixed K."""
    small = Effort(effort.seconds / 2, effort.least, effort.most)
    loops, forwards, kernels = {}, {}, []
    for layers in (2, 4) if quick else (2, 8, 32):
        step = SliceStep(device, n_layer=2 * layers, n_embd=32, batch_size=2)
        calls = [call for call in recorded_calls(step) if call[0].__name__ == "collect_trace"]
        work, args, kwargs = calls[0]
        trace = step.loop.last
        with Traffic() as of_loop:
            step.loop.step(trace)
        with Traffic() as of_statistics:
            work(*args, **kwargs)
        kernels += [(f"loop, L={layers}", of_loop.operators, "operators")]
        kernels += [(f"statistics, L={layers}", of_statistics.operators, "operators")]
        loops[f"the loop, L={layers}"] = lambda step=step, trace=trace: step.loop.step(trace)
        forwards[f"statistics, L={layers}"] = lambda call=calls[0]: call[0](*call[1], **call[2])
    report.tell("layers", "operators that compute, by MoE layers", kernels)
    report.compare("layers", "the loop by MoE layers (E=8, D=32)", in_turns(loops, device, small))
    report.compare("layers", "statistics of the routing by MoE layers (E=8, N=256)", in_turns(forwards, device, small))
    compiled(report, device)

    by_experts, tokens = {}, 1024 if quick else 4096
    for experts in (8, 16) if quick else (8, 16, 32, 64, 128):
        work, _ = competitors(tokens, 128, experts, 2, device)
        by_experts[f"MoE layer, E={experts}"] = work["MoE layer, balanced"]
    report.compare("experts", f"MoE layer by experts (N={tokens}, D=128, K=2)", in_turns(by_experts, device, effort))


def compiled(report: Report, device: torch.device) -> None:
    """Kernels of the loop under torch.compile, if it works here."""
    import torch._inductor.metrics as metrics

    lines = []
    for layers in (2, 32):
        step = SliceStep(device, n_layer=2 * layers, n_embd=32, batch_size=2)
        step()
        trace, found_inf = step.loop.last, torch.zeros((), device=device)
        step.loop.compile()
        metrics.reset()
        try:
            with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that its caches are off
                step.loop.step(trace, found_inf)
        except Exception as e:
            report.say(f"\nthe loop cannot be compiled here: {type(e).__name__}")
            return
        lines.append((f"the loop compiled, L={layers}", metrics.generated_kernel_count, "kernels"))
        found = in_turns({"loop": lambda: step.loop.step(trace, found_inf)}, device, Effort(1, 7, 1000))  # noqa: B023
        lines.append((f"the loop compiled, L={layers}", statistics.median(found["loop"]), "ms"))
    report.tell("layers", "the loop under torch.compile, by MoE layers", lines)


def measure_data(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Batches a second at the slice's shape and at nanoMoE's, from a file of random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for split, size in {"train": 1 << (20 if quick else 26), "val": 1 << 16}.items():
            np.random.Generator(np.random.Philox(0)).integers(256, size=size, dtype=np.uint16).tofile(
                Path(folder) / f"{split}.bin"
            )
        lines = []
        for rows, length in ((16, 128), (12, 1024)):
            data = TokenData(Path(folder), length)
            places = iter(range(1 << 30))
            work = {"batch": lambda: data.batch("train", 0, next(places), 0, rows)}  # noqa: B023
            found = in_turns(work, torch.device("cpu"), Effort(min(effort.seconds, 2), effort.least, 5000))
            lines.append((f"{rows} x {length} tokens", 1000 / statistics.median(found["batch"]), "batches a second"))
    report.tell("data", "batches from a memory-mapped file of random tokens", lines)
