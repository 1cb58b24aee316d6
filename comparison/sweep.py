"""Train every arm with every seed, several runs at a time. Finished runs are kept, interrupted runs are resumed.

An existing run is used only if its settings, data, initial weights and arm are the requested ones. Otherwise no run is
started.
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
from trainer.data import fingerprint, open_texts
from trainer.device import resolve_dtype, select_device
from trainer.errors import UserError
from trainer.files import open_regular, parse_json, read_text
from trainer.interrupt import PARENT, Interrupt
from trainer.lock import LOCK
from trainer.runlog import wandb_group
from trainer.settings import COMPARED

TRAIN = Path(__file__).parent.parent / "train.py"
LOG = "train.log"
LINE_SECONDS = 60  # between lines of progress where stdout is not a terminal


@dataclass
class Job:
    """One training run of the study."""

    arm: str
    seed: int
    out_dir: Path
    arguments: list[str]  # the full command line of train.py
    steps: int
    log_start: int = 0  # offset in the log file at which the current start begins
    error: str = ""  # why it failed

    @property
    def done(self) -> int:
        """The last step that the run has logged."""
        try:
            with open_regular(self.out_dir / "metrics.jsonl") as f:
                steps = [parse_json(line)["step"] for line in f if line.endswith(b"\n")]
                return max((step for step in steps if isinstance(step, int)), default=0)
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    @property
    def finished(self) -> bool:
        """Whether no step is left. A run with a damaged config.json is resumed, which writes the file again."""
        return self.done >= self.steps and _config_json(self.out_dir) is not None

    @property
    def locked(self) -> bool:
        """Whether another process holds the lock on the run's folder."""
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
        """Why the process failed, from its exit status and its log."""
        with (self.out_dir / LOG).open("rb") as f:
            f.seek(self.log_start)
            lines = f.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:") or "Error: " in line]
        if errors:
            return errors[-1].removeprefix("error: ")
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        how = how if status else f"ended at step {self.done} of {self.steps}"
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}; {last}; see {self.out_dir / LOG}" if last else f"{how}; see {self.out_dir / LOG}"


def plan(arguments: list[str], out: Path, arms: list[str], seeds: int) -> list[Job]:
    """The runs of a study, ordered by seed, so that complete pairs are available early.

    arguments: of train.py, for all arms; the settings that define an arm override them. Raises UserError for an unknown
    arm, settings of any arm that are invalid, a dataset that cannot be opened, or a run in `out` that is not the
    requested one.
    """
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError(f"--arms: there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms={','.join(arms)}: an arm is given twice")
    given = setting.given([*arguments, "--arm="])
    if given.get("eval_only"):
        raise UserError("eval_only=True: a study trains its runs")
    source = given.get("init_from", "scratch").removeprefix("auto:")
    if source == "resume":
        raise UserError("init_from='resume': a study resumes its own interrupted runs; leave init_from out")
    source = "scratch" if source == "auto" else source
    jobs, wanted = [], {}
    for arm in arms:
        of_arm = [a for a in arguments if a.removeprefix("--").partition("=")[0] not in ARMS[arm]]
        of_arm += [f"--arm={arm}", f"--init_from={'auto' if source == 'scratch' else f'auto:{source}'}"]
        wanted[arm] = resolved(of_arm, source)
        for seed in range(1, seeds + 1):
            out_dir = out / f"{arm}_seed{seed}"
            of_run = [*of_arm, f"--seed={seed}", f"--out_dir={out_dir}"]
            jobs.append(Job(arm, seed, out_dir, of_run, wanted[arm]["max_iters"]))
    if given.get("wandb_log") and not given.get("wandb_group"):
        group = wandb_group(next((wanted[arm] for arm in arms if arm != "load"), wanted[arms[0]]))
        for job in jobs:  # of all arms, although `load` sets other keys too
            job.arguments.append(f"--wandb_group={group}")
    jobs.sort(key=lambda job: job.seed)
    open_texts(setting.from_values(known_settings(wanted[arms[0]])))
    data: dict[str, Any] = {}
    for job in jobs:
        config = config_of(job.out_dir)
        if config is not None:
            data = data or identity_of_data(wanted[job.arm])
            check_same(job, config, wanted[job.arm] | data | {"seed": job.seed})
    return jobs


def resolved(arguments: list[str], source: str) -> dict[str, Any]:
    """All settings that train.py derives from these arguments on this machine, and the digest of initial weights."""
    start = resume.resolve_start(setting.given(arguments) | {"init_from": source})
    s = start.settings
    device = select_device(s.device)
    s.device, s.dtype = str(device), resolve_dtype(s.dtype, device)
    return s.flat() | {"weights_sha256": start.weights_sha256, "vocab_size": start.vocab_size}


def identity_of_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that identify the datasets. Initial weights determine the vocabulary."""
    texts = open_texts(setting.from_values(known_settings(config)))
    for data in texts.values():
        data.vocab_size = config["vocab_size"] or data.vocab_size
    sha256 = {name: file["sha256"] for name, file in fingerprint(texts).items()}
    return {"data_sha256": sha256, "vocab_size": texts[config["dataset"]].vocab_size}


def known_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of train.py in a config.json."""
    return {name: value for name, value in config.items() if name in setting.keys()}


def load(job: Job) -> Run:
    """The finished run of a job. Raises Unusable, with the arm and seed of the job."""
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
    """The settings of the run in a folder, from config.json or else from its checkpoint; None if there is no run."""
    config = _config_json(out_dir)
    if config is not None or not checkpoint.exists(out_dir):
        return config
    saved = checkpoint.newest(out_dir)[0]
    files = saved.get("data") or {}
    return saved.get("config", {}) | {
        "weights_sha256": saved.get("weights_sha256"),
        "data_sha256": {name: file["sha256"] for name, file in files.items()},
        "vocab_size": saved["model_args"].get("vocab_size"),
    }


def check_same(job: Job, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if an existing run is not the requested one. It may have fewer steps: then it is continued."""
    for key in differing(config, wanted, (*COMPARED, "arm", "seed")):
        existing, requested = value_of(config, key), value_of(wanted, key)
        is_shorter = key == "max_iters" and isinstance(existing, int) and existing < requested
        # config.json also describes the machine, and older versions did not write every key
        is_known = key in wanted and (key in config or key in setting.keys())
        if is_known and not is_shorter:
            raise UserError(
                f"{job.out_dir} holds a run with {key}={existing!r}, but {key}={requested!r} is requested: give "
                "another --out_dir, or remove the run"
            )


def train_all(jobs: list[Job], parallel: int, interrupt: Interrupt) -> list[Job]:
    """Train the unfinished runs, `parallel` at a time with an equal number of threads. Returns the jobs that failed.

    A signal stops the running processes. Each saves a checkpoint, so that the same command continues from there. The
    processes also stop if this process is killed. Raises UserError if the first runs, as many as run at a time, fail
    and no run of the study is finished.
    """
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    waiting = [job for job in jobs if not job.finished]
    first = min(parallel, len(waiting))
    running: dict[subprocess.Popen, Job] = {}
    failed: list[Job] = []
    is_hopeless = False
    with Display(jobs) as display:
        while (waiting or running) and not interrupt.received and not is_hopeless:
            for job in list(waiting):
                if len(running) < parallel and not job.locked:
                    waiting.remove(job)
                    if not job.finished:  # another process may have finished it meanwhile
                        running[_start(job, environment)] = job
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                if (process.returncode != 0 or not job.finished) and not interrupt.received:
                    job.error = job.failure(process.returncode)
                    failed.append(job)
                    display.say(f"failed: {job.out_dir}: {job.error}")
            is_hopeless = len(failed) >= first > 0 and not any(job.finished for job in jobs)
            state = "training " + ", ".join(f"{job.arm} {job.seed}" for job in running.values()) if running else ""
            if waiting and not running and waiting[0].locked:
                state = f"waiting for the process that is writing to {waiting[0].out_dir}"
            display.update(state, sum(job.finished for job in jobs if job not in running.values()))
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if interrupt.received:
            display.say("stopped, and the unfinished runs are saved; to continue: repeat the command")
    if is_hopeless and not interrupt.received:
        what = "the first run" if len(failed) == 1 else f"the first {len(failed)} runs"
        raise UserError(f"{what} failed, so the study was stopped: {failed[-1].out_dir}: {failed[-1].error}")
    return failed


class Display:
    """Progress of a study: a bar on a terminal, else a line when a run ends and at least every minute."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.total = sum(job.steps for job in jobs)
        self.first = sum(job.done for job in jobs)  # steps done before this start
        self.began = self.printed = time.monotonic()
        self.finished = sum(job.finished for job in jobs)
        self.bar: tqdm | None = None
        if sys.stdout.isatty():
            self.bar = tqdm(
                total=self.total, initial=self.first, unit="step", smoothing=0.05, dynamic_ncols=True, file=sys.stdout
            )

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def update(self, state: str, finished: int) -> None:
        """Show the steps done. state: what is being done. finished: number of runs that have ended with all steps."""
        done = sum(job.done for job in self.jobs)
        if self.bar is not None:
            self.bar.set_postfix_str(state)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if finished == self.finished and now - self.printed < LINE_SECONDS:
            return
        self.finished, self.printed = finished, now
        new, left = done - self.first, ""
        if state and 0 < new and done < self.total:
            left = f", about {tqdm.format_interval((now - self.began) * (self.total - done) / new)} left"
        line = f"{finished} of {len(self.jobs)} runs finished, {done} of {self.total} steps{left}"
        print(f"{line}; {state}" if state else line, flush=True)


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    job.out_dir.mkdir(parents=True, exist_ok=True)
    with (job.out_dir / LOG).open("ab") as log:
        job.log_start = log.tell()
        # in its own session: Ctrl-C must not reach it directly, because train_all passes it on as a signal
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *job.arguments],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
