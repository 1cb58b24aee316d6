"""Measure the cost of the loop, and the MoE layer and the training step relative to what the machine can do.

    python bench.py                        all parts, 25 minutes on two cores
    python bench.py --quick                all parts at small sizes, to see that they run
    python bench.py step memory            some parts
    python bench.py --json > bench.json    results as JSON on stdout, tables on stderr
    python bench.py profile --against=../old             also the training step of another checkout
    python -m benchmark.gpu                              tests, training runs, timings and targets on a GPU
    torchrun --standalone --nproc_per_node=2 bench.py    what several ranks add to a step

parts: layer    the MoE layer, a dense MLP with as many multiplications, and one-hot dispatch
       step     the five steps added one by one; all on and all off; statistics and loop alone
       memory   peak memory of layer and step
       loop     cost by number of layers and of experts
       data     batches per second
       rates    matmul rate, and the share of it that dense and MoE models reach; on CUDA also kernels and waits
       scaling  numbers of operations, bytes and operators, and the formulas of docs/scaling.md
       saving   how long saving a checkpoint delays training
       profile  time of a training step by operator, and its lower bound (CPU)

Competitors take turns within one run, so that a change of the machine's speed affects all of them. Layers are timed in
three processes. Tables show medians, and ratios to the first competitor with their interquartile range. A ratio is
marked as noisy if its 95% interval is wider than 5% on either side, or if the processes disagree. On CUDA the experts
run in bfloat16, kernels are fused as in train.py, and a turn is four calls.
"""

from __future__ import annotations

from trainer.errors import UserError, run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import json
import os
import platform
import shlex
import time
from dataclasses import dataclass

import torch

from benchmark import layer, loop, memory, profile, rates, scaling, step
from benchmark.timing import Effort, Report
from chronomoe.options import option, options_of, same_option
from trainer import cli
from trainer.device import kernel_fusion, select_device
from trainer.distributed import process_group, torchrun_environment
from trainer.environment import describe_environment
from trainer.memory import one_line_out_of_memory
from trainer.settings import Settings

PARTS = {
    "layer": layer.measure,
    "step": step.measure,
    "memory": memory.measure,
    "loop": loop.measure,
    "data": loop.measure_data,
    "rates": rates.measure,
    "scaling": scaling.measure,
    "saving": step.measure_saving,
}


@dataclass
class Options:
    """The options of bench.py."""

    device: str = same_option(Settings, "device")
    quick: bool = option(False, "small sizes and few turns")
    seconds: float | None = option(None, "seconds per comparison; None: 12, with --quick 0.5", least=0)
    json: bool = option(False, "print the results as JSON")
    against: str | None = option(None, "folder of another checkout, for profile")


def main(arguments: list[str]) -> int:
    if cli.asks_for_help(arguments):
        print(cli.help_text(__doc__, options_of(Options)))
        return 0
    line = cli.parse(arguments, options_of(Options), positional=True)
    options, parts = Options(**line.options), line.arguments
    unknown = [part for part in parts if part not in (*PARTS, "profile")]
    if unknown:
        raise UserError(f"no part {unknown[0]!r}: there are {', '.join([*PARTS, 'profile'])}")
    effort = Effort(seconds=12.0, least=7, most=60)
    if options.quick:
        effort = Effort(seconds=0.5, least=3, most=10)
    if options.seconds is not None:
        effort = Effort(options.seconds, effort.least, effort.most)

    report = Report(quiet=options.json)
    if torchrun_environment()[1] > 1:
        with process_group("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu", "nccl") as world:
            step.across_ranks(report, world, select_device(options.device, world), 4 * effort.least)
            if options.json and world.is_main:
                print(json.dumps({"tables": report.tables}, indent=1))
        return 0
    device = select_device(options.device)
    began = time.time()
    facts = machine(device) | {"command": "python bench.py " + shlex.join(arguments)}
    report.info("; ".join(f"{name} {value}" for name, value in facts.items()))
    fused, notes = kernel_fusion(compile=False, fuse=True, device=device)
    for note in notes:
        report.info(note)
    with fused, one_line_out_of_memory("measure fewer parts, or give --quick"):
        for part in parts or [*PARTS, *(["profile"] if device.type == "cpu" and not options.quick else [])]:
            if part == "profile":
                profile.measure(report, effort, options.quick, options.against)
            else:
                PARTS[part](report, device, effort, options.quick)
    report.info(f"\n{time.time() - began:.0f} s")
    if options.json:
        print(json.dumps(facts | {"tables": report.tables}, indent=1))
    return 0


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions that the numbers come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({cpu_name()})"
    environment = describe_environment()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "git": str(environment.get("git_commit", "")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            found = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), None)
    except OSError:
        found = None
    return f"{found or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    run_script(main)
