"""Train every arm with every seed: finished runs are kept, stopped ones resumed, `jobs` at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.arms import ARMS
from trainer.errors import UserError
from trainer.files import parse_json

TRAIN = Path(__file__).parent.parent / "train.py"
LOG = "train.log"


@dataclass
class Job:
    """One run of the study: an arm with a seed."""

    arm: str
    seed: int
    out_dir: Path
    arguments: list[str]  # train.py's, without out_dir, seed and init_from
    steps: int

    @property
    def done(self) -> int:
        """Steps that the run has logged."""
        try:
            with (self.out_dir / "metrics.jsonl").open("rb") as f:
                steps = [parse_json(line)["step"] for line in f if line.endswith(b"\n")]
                return max((step for step in steps if isinstance(step, int)), default=0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    def command(self) -> list[str]:
        own = [f"--seed={self.seed}", f"--out_dir={self.out_dir}", "--init_from=auto"]
        return [sys.executable, str(TRAIN), *self.arguments, *own]


def plan(arguments: list[str], out: Path, steps: int, arms: list[str], seeds: int) -> list[Job]:
    """The study's runs, seed by seed, so that whole pairs are there early. Raises UserError for an unknown arm.

    arguments: train.py's, for all arms; what an arm sets itself wins.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    return [
        Job(
            arm,
            seed,
            out / f"{arm}_seed{seed}",
            [*arguments, *(f"--{key}={value}" for key, value in ARMS[arm].items())],
            steps,
        )
        for seed in range(1, seeds + 1)
        for arm in arms
    ]


def train_all(jobs: list[Job], parallel: int) -> list[Job]:
    """Run what is not finished, `parallel` at a time with equal threads. Returns the jobs that failed.

    Ctrl-C is passed on: each run saves its checkpoint, and the same command goes on from there.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    waiting = [job for job in jobs if not job.finished]
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    total = sum(job.steps for job in jobs)
    with tqdm(total=total, initial=sum(job.done for job in jobs), unit="step", smoothing=0.05) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[_start(job, environment)] = job
                time.sleep(0.5)
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode != 0 or not job.finished:
                        failed.append(job)
                        bar.write(f"failed: {job.out_dir}: {_last_line(job)}")
                bar.set_postfix_str(", ".join(f"{job.arm} {job.seed}" for job in running.values()))
                bar.update(sum(job.done for job in jobs) - bar.n)
        except KeyboardInterrupt:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            bar.write("stopped, and the runs under way are saved: the same command goes on")
            raise
    return failed


def _start(job: Job, environment: dict[str, Any]) -> subprocess.Popen:
    job.out_dir.mkdir(parents=True, exist_ok=True)
    with (job.out_dir / LOG).open("ab") as log:
        # its own session: Ctrl-C reaches it through us, once
        return subprocess.Popen(
            job.command(), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _last_line(job: Job) -> str:
    lines = (job.out_dir / LOG).read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it printed nothing"
