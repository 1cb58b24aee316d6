"""Measure peak memory, each case in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmark import one_hot
from benchmark.layer import competitors
from benchmark.step import SliceStep
from benchmark.timing import Effort, Report
from chronomoe.config import STEPS

ROOT = Path(__file__).parent.parent
LAYER = {"dense MLP": "dense MLP", "MoE layer": "MoE layer, balanced", "one-hot dispatch": "one-hot dispatch"}
CASES = ("all steps off", "all steps on", "one-hot dispatch")


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Additional memory of forward and backward, at N=12288 tokens of the slice's width."""
    tokens = 1024 if quick else 12288
    for kind, names in {"layer": tuple(LAYER), "step": CASES}.items():
        lines = []
        for name in names:
            command = [sys.executable, "-m", "benchmark.memory", kind, name, str(tokens), str(device)]
            answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            lines.append((name, json.loads(answer) / 2**20, "MB"))
        first = lines[-1][1]
        lines += [(f"{name} / one-hot", value / first, "") for name, value, _ in lines[:-1]]
        what = "MoE layer" if kind == "layer" else "training step of the slice"
        report.numbers("memory", f"peak memory of the {what}, N={tokens}, D=128, E=8, K=2", lines, N=tokens)


def peak(kind: str, name: str, tokens: int, device: torch.device) -> int:
    """Peak memory, in bytes, of one forward and backward or one training step, above the memory held before it."""
    if kind == "layer":
        work = competitors(tokens, 128, 8, 2, device)[0][LAYER[name]]
    else:
        prepare = one_hot.use_one_hot if name == "one-hot dispatch" else None
        work = SliceStep(device, STEPS if name == "all steps on" else (), tokens // 128, prepare)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    reset_peak()
    before = peak_of_process()
    work()
    return peak_of_process() - before


def reset_peak() -> None:
    """Reset the peak memory that Linux records to the memory that this process holds now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_of_process() -> int:
    """Peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    kind, name, tokens, device = sys.argv[1:]
    print(json.dumps(peak(kind, name, int(tokens), torch.device(device))), flush=True)
    os._exit(0)  # on CUDA a thread of autograd can abort the process while Python exits
