"""Time of a training step by operator, its lower bound, and the training step of another checkout."""

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


def measure(report: Report, effort: Effort, quick: bool, against: str | None) -> None:
    """Share of each operator in a training step, on the CPU. against: folder of another checkout of this project."""
    if against is not None and not (Path(against) / "model.py").exists():
        raise UserError(f"--against={against}: no model.py there; give a checkout of this project")
    checkouts = {"this one": str(HERE.parent)} | ({"the other": str(Path(against).resolve())} if against else {})
    rate = matmul_rates(torch.device("cpu"), effort)["torch.mm"]  # one_step.py trains on the CPU
    for shape, steps in ({"slice": 3} if quick else {"slice": 30, "nanoMoE": 3}).items():
        answers: dict[str, list[dict]] = {name: [] for name in checkouts}
        for turn in range(3 if against else 1):
            for name, checkout in checkouts.items() if turn % 2 == 0 else reversed(checkouts.items()):
                command = [sys.executable, str(HERE / "one_step.py"), checkout, shape, str(steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                    raise UserError(f"the training step of {checkout} fails: {reason}")
                answers[name].append(json.loads(done.stdout))
        if against:
            times = {name: [answer["ms"] for answer in of_checkout] for name, of_checkout in answers.items()}
            report.comparison("profile", f"training step at the shape of {shape}, processes in turns", times)
        for name, of_checkout in answers.items():
            last = of_checkout[-1]
            floor = last["flops"] / rate * 1000
            lines = [("one step", last["ms"], "ms"), ("its multiplications at the rate of torch.mm", floor, "ms")]
            lines += [("peak memory of the process", last["peak_bytes"] / 2**20, "MB")]
            whole = last["all_operators_ms"]
            lines += [(operator[:60], 100 * ms / whole, "%") for operator, ms in last["operators"].items()]
            report.numbers("profile", f"shape of {shape}, {name}: operators by self time", lines)
