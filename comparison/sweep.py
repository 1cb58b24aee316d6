"""Train every arm with every seed: what is finished is kept, what was stopped goes on, several runs at a time.

A run that is there counts only if it is the run that is asked for: the same settings, data, initial weights and arm.
Otherwise nothing is started.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from comparison.runs import Run, Unusable, differing, load_run, value_of
from trainer import checkpoint, resume
from trainer import settings as setting
from trainer.arms import ARMS
from trainer.data import open_dataset
from trainer.device import resolve_dtype, select_device
from trainer.errors import UserError
from trainer.files import parse_json, read_text
from trainer.interrupt import PARENT, Interrupt
from trainer.lock import LOCK
from trainer.settings import COMPARED

TRAIN = Path(__file__).parent.parent / "train.py"
LOG = "train.log"


@dataclass
class Job:
    """One run of the study: an arm with a seed."""

    arm: str
    seed: int
    out_dir: Path
    arguments: list[str]  # train.py's, complete
    steps: int
    log_start: int = 0  # where in its log file this start begins

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
        """Whether all is done. A run whose config.json is damaged is resumed, which writes it again."""
        return self.done >= self.steps and _config_json(self.out_dir) is not None

    @property
    def locked(self) -> bool:
        """Whether a process is writing the run."""
        if not (self.out_dir / LOCK).exists():
            return False
        lock = FileLock(self.out_dir / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        except OSError:
            return False  # a file system without locks
        lock.release()
        return False

    def failure(self, status: int) -> str:
        """Why the process ended, by what it printed."""
        with (self.out_dir / LOG).open("rb") as f:
            f.seek(self.log_start)
            lines = f.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:") or "Error: " in line]
        if errors:
            return errors[-1]
        if status == 0:
            return f"it ended at step {self.done} of {self.steps}; see {self.out_dir / LOG}"
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{how}; see {self.out_dir / LOG}"


def plan(arguments: list[str], out: Path, arms: list[str], seeds: int) -> list[Job]:
    """The study's runs, seed by seed, so that whole pairs are there early.

    arguments: train.py's, for all arms; what an arm sets itself wins. Raises UserError for an unknown arm, settings
    that make no sense, or a run in `out` that is not the one asked for.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms={','.join(arms)}: an arm is there twice")
    given = setting.given([*arguments, "--arm="])
    if given.get("eval_only"):
        raise UserError("eval_only=True: a study trains its runs")
    source = given.get("init_from", "scratch").removeprefix("auto:")
    if source == "resume":
        raise UserError("init_from='resume': a study starts its runs itself, and goes on with those that stopped")
    source = "scratch" if source == "auto" else source
    jobs, wanted = [], {}
    for arm in arms:
        own = [a for a in arguments if a.removeprefix("--").partition("=")[0] not in ARMS[arm]]
        own += [f"--arm={arm}", f"--init_from={'auto' if source == 'scratch' else f'auto:{source}'}"]
        wanted[arm] = resolved(own, source)
        for seed in range(1, seeds + 1):
            out_dir = out / f"{arm}_seed{seed}"
            jobs.append(
                Job(arm, seed, out_dir, [*own, f"--seed={seed}", f"--out_dir={out_dir}"], wanted[arm]["max_iters"])
            )
    jobs.sort(key=lambda job: job.seed)
    data: dict[str, Any] = {}
    for job in jobs:
        config = config_of(job.out_dir)
        if config is not None:
            data = data or identity_of_data(wanted[job.arm])
            check_same(job, config, wanted[job.arm] | data | {"seed": job.seed})
    return jobs


def resolved(arguments: list[str], source: str) -> dict[str, Any]:
    """Every setting that train.py takes these arguments to mean, here, and the digest of the weights to start from."""
    start = resume.resolve_start(setting.given(arguments) | {"init_from": source})
    s = start.settings
    device = select_device(s.device)
    s.device, s.dtype = str(device), resolve_dtype(s.dtype, device)
    return s.flat() | {"weights_sha256": start.weights_sha256, "vocab_size": start.vocab_size}


def identity_of_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that say what the dataset is. With weights to start from, the vocabulary is theirs."""
    data = open_dataset(config["dataset"], config["block_size"])
    data.vocab_size = config["vocab_size"] or data.vocab_size
    sha256 = {name: look["sha256"] for name, look in data.fingerprint().items()}
    return {"data_sha256": sha256, "vocab_size": data.vocab_size}


def load(job: Job) -> Run:
    """The run of a job. Raises Unusable, with the job's arm and seed."""
    try:
        return load_run(job.out_dir)
    except Unusable as e:
        e.arm, e.seed, e.is_run = job.arm, job.seed, True
        raise


def _config_json(out_dir: Path) -> dict[str, Any] | None:
    try:
        config = parse_json(read_text(out_dir / "config.json"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def config_of(out_dir: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, by config.json or else by its checkpoint; None if there is no run."""
    config = _config_json(out_dir)
    if config is not None or not checkpoint.exists(out_dir):
        return config
    saved = checkpoint.newest(out_dir)[0]
    files = saved.get("data") or {}
    return saved["config"] | {
        "weights_sha256": saved.get("weights_sha256"),
        "data_sha256": {name: look["sha256"] for name, look in files.items()},
        "vocab_size": saved["model_args"].get("vocab_size"),
    }


def check_same(job: Job, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if the run that is there is not the one asked for. It may be shorter: then it goes on."""
    for key in differing(config, wanted, (*COMPARED, "arm", "seed")):
        theirs, ours = value_of(config, key), value_of(wanted, key)
        shorter = key == "max_iters" and isinstance(theirs, int) and theirs < ours
        # what else config.json holds is of the machine that ran it; an older version did not write all of it
        here = key in wanted and (key in config or key in setting.keys())
        if here and not shorter:
            raise UserError(
                f"{job.out_dir} holds a run with {key}={theirs!r}, and {key}={ours!r} is asked for: give another "
                "--out_dir, or remove it"
            )


def train_all(jobs: list[Job], parallel: int, interrupt: Interrupt) -> list[Job]:
    """Run what is not finished, `parallel` at a time with equal threads. Returns the jobs that failed.

    After a signal the running processes are stopped; each saves a checkpoint, and the same command continues from
    there. They do the same by themselves if this process is killed.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    waiting = [job for job in jobs if not job.finished]
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    total = sum(job.steps for job in jobs)
    with tqdm(total=total, initial=sum(job.done for job in jobs), unit="step", smoothing=0.05) as bar:
        while (waiting or running) and not interrupt.received:
            for job in list(waiting):
                if len(running) < parallel and not job.locked:
                    waiting.remove(job)
                    if not job.finished:  # the process that held the lock may have finished it
                        running[_start(job, environment)] = job
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                if (process.returncode != 0 or not job.finished) and not interrupt.received:
                    failed.append(job)
                    bar.write(f"failed: {job.out_dir}: {job.failure(process.returncode)}")
            under_way = ", ".join(f"{job.arm} {job.seed}" for job in running.values())
            if waiting and not running and waiting[0].locked:
                under_way = f"waiting for the process that writes {waiting[0].out_dir}"
            bar.set_postfix_str(under_way)
            bar.update(sum(job.done for job in jobs) - bar.n)
        if interrupt.received:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            bar.write("stopped, and the runs under way are saved: the same command goes on")
    return failed


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    job.out_dir.mkdir(parents=True, exist_ok=True)
    with (job.out_dir / LOG).open("ab") as log:
        job.log_start = log.tell()
        # its own session: Ctrl-C reaches it through us, once
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *job.arguments],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
