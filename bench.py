"""What the loop costs, and how close the MoE layer and the step around it are to what the machine can do.

    python bench.py                        everything, 25 minutes on two cores
    python bench.py --quick                the same at small sizes, to see that it runs
    python bench.py step memory            some of it
    python bench.py --json > bench.json    for a program; the tables go to the error output
    python bench.py profile --against=../old    another checkout's step beside this one's
    torchrun --standalone --nproc_per_node=2 bench.py    what ranks add to a step

parts: layer    the MoE layer against a dense MLP of the same multiplications and one-hot dispatch
       step     the five steps added one by one; all on against all off; statistics and loop by themselves
       memory   peak memory of both
       loop     cost against the number of layers and of experts
       data     batches a second
       rates    matmul rate, and the share of it that dense and MoE models reach; on CUDA kernels and waits
       scaling  counts of operations, bytes and operators beside the formulas of docs/scaling.md
       saving   how long a checkpoint holds training up
       profile  where a step's time goes, and its floor (CPU)

Competitors are timed in turn within one run, so that a machine whose speed drifts slows them alike; layers in three
processes. Printed are medians and the ratios to the first competitor with their middle half. A ratio is too noisy to
tell if its 95% interval reaches further than 5%, or if a process has another one. On CUDA the experts run in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time

import torch

from benchmark import layer, loop, memory, profile, rates, scaling, step
from benchmark.timing import Effort, Report
from trainer.device import select_device
from trainer.distributed import process_group
from trainer.environment import describe_environment
from trainer.errors import UserError, run_script

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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--quick", action="store_true", help="small sizes and few turns")
    parser.add_argument("--seconds", type=float, help="how long to pursue each comparison, default 12")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--against", metavar="FOLDER", help="another checkout, for profile")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in (*PARTS, "profile")]
    if unknown:
        raise UserError(f"no part {unknown[0]!r}: there are {', '.join([*PARTS, 'profile'])}")
    effort = Effort(seconds=12.0, least=7, most=60)
    if options.quick:
        effort = Effort(seconds=0.5, least=3, most=10)
    if options.seconds is not None:
        effort = Effort(options.seconds, effort.least, effort.most)

    report = Report(quiet=options.json)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with process_group("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu", "nccl") as world:
            step.across_ranks(report, world, select_device(options.device, world), 4 * effort.least)
            if options.json and world.is_main:
                print(json.dumps({"tables": report.tables}, indent=1))
        return 0
    device = select_device(options.device)
    began = time.time()
    facts = machine(device) | {"command": "python bench.py " + shlex.join(arguments)}
    report.info("; ".join(f"{name} {value}" for name, value in facts.items()))
    for part in options.parts or [*PARTS, *(["profile"] if device.type == "cpu" and not options.quick else [])]:
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
