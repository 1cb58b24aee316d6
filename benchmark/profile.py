"""Where a step's time goes, against its floor, and against another checkout's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmark.rates import matmul_rates
from benchmark.timing import Effort, Report
from trainer.errors import UserError

HERE = Path(__file__).parent


def measure(report: Report, effort: Effort, against: str | None) -> None:
    """Operators by their share of a step, on a CPU; `against` names a folder with another version of the project."""
    if against is not None and not (Path(against) / "model.py").exists():
        raise UserError(f"--against={against}: no model.py there; give a checkout of this project")
    trees = {"this one": str(HERE.parent)} | ({"the other": str(Path(against).resolve())} if against else {})
    rate = matmul_rates(torch.device("cpu"), effort)["torch.mm"]  # one_step.py trains there
    for shape, steps in (("slice", 30), ("nanoMoE", 3)):
        answers: dict[str, list[dict]] = {name: [] for name in trees}
        for turn in range(3 if against else 1):
            for name, tree in trees.items() if turn % 2 == 0 else reversed(trees.items()):
                command = [sys.executable, str(HERE / "one_step.py"), tree, shape, str(steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise UserError(f"the step of {tree} fails: {done.stderr.strip().splitlines()[-1]}")
                answers[name].append(json.loads(done.stdout))
        if against:
            times = {name: [answer["ms"] for answer in of_tree] for name, of_tree in answers.items()}
            report.compare("profile", f"training step at {shape}'s shape, processes in turn", times)
        for name, of_tree in answers.items():
            last = of_tree[-1]
            floor = last["flops"] / rate * 1000
            lines = [("a step", last["ms"], "ms"), ("its multiplications at torch.mm's rate", floor, "ms")]
            lines += [("peak memory of the process", last["peak_bytes"] / 2**20, "MB")]
            whole = last["all_operators_ms"]
            lines += [(operator[:60], 100 * ms / whole, "%") for operator, ms in last["operators"].items()]
            report.tell("profile", f"{shape}'s shape, {name}: operators by their own time", lines)
