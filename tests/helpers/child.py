"""Run train.py in child processes, forked from a server that has imported torch: real signals and kills, quickly."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

started: list = []


def start(arguments: list[str], log: Path, until_step=None, file_limit: int | None = None, environment=None):
    """Start train.py with these arguments and append its output to `log`. Returns the process.

    until_step: wait for the console line of this step. file_limit: largest file size, in bytes. environment: variables
    to set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.child", "train", "torch._dynamo"])
    process = context.Process(target=_run, args=(arguments, str(log), file_limit, environment or {}))
    process.start()
    started.append(process)
    if until_step is not None:
        wait_for_step(log, until_step)
    return process


def start_ranks(arguments: list[str], count: int, log: Path):
    """Start train.py on `count` ranks, as torchrun does. Returns the processes by rank."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(count)}
    ranks = [dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(count)]
    return [start(arguments, log, environment=world | rank) for rank in ranks]


def finish(process, seconds: float = 60) -> int:
    """Wait for the process. Returns its exit status, or minus the signal that killed it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"not done after {seconds} s")
    return process.exitcode


def stop(process, number: int) -> int:
    """Send a signal. Returns the exit status."""
    os.kill(process.pid, number)
    return finish(process, 10)


def run(arguments: list[str], log: Path, **options) -> int:
    """Run train.py to its end. Returns the exit status."""
    return finish(start(arguments, log, **options))


def run_ranks(arguments: list[str], count: int, log: Path) -> list[int]:
    """Run train.py on `count` ranks to the end. Returns the exit statuses by rank."""
    return [finish(process) for process in start_ranks(arguments, count, log)]


def set_file_limit(process_id: int, size: int | None) -> None:
    """Limit the size of the files of a process, in bytes. 0: this process. None: no limit."""
    limit = resource.RLIM_INFINITY if size is None else size
    resource.prlimit(process_id, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def kill_all() -> None:
    """Kill the processes that a failed test left running."""
    while started:
        started.pop().kill()


def wait_for(condition, seconds: float = 30):
    """Poll until condition() is true. Raises AssertionError if that takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not become true"
        time.sleep(0.002)


def wait_for_step(log: Path, step: int, seconds: float = 30):
    """Wait until `log` has the row of this step."""
    wait_for(lambda: log.exists() and any(line.split()[:1] == [str(step)] for line in log.open()), seconds)


def _run(arguments: list[str], log: str, file_limit: int | None, environment: dict) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]  # set by W&B in the process that started the server
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["train.py", *arguments]
    import torch

    import train
    from trainer.errors import run_script

    torch.set_num_threads(1)
    set_file_limit(0, file_limit)
    run_script(train.main)
