"""train.py in processes of its own, forked from a server that has torch loaded: real signals, real deaths, quickly."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

started: list = []


def start(arguments: list[str], log: Path, file_limit: int | None = None, uid: int | None = None, environment=None):
    """Start train.py with these arguments; what it prints goes to `log`. Returns the process, to be joined or killed.

    file_limit: bytes that no file may grow beyond. uid: the user to be. environment: variables to set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.child", "train"])
    process = context.Process(target=_run, args=(arguments, str(log), file_limit, uid, environment))
    process.start()
    started.append(process)
    return process


def kill_all() -> None:
    """Leave none running: a test may have failed before it ended its own."""
    while started:
        started.pop().kill()


def finish(process, seconds: float = 60) -> int:
    """The exit status; negative: the signal that killed it. Raises AssertionError if it takes longer."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"not done after {seconds} s")
    return process.exitcode


def wait_for(condition, seconds: float = 30):
    """Poll until condition() is true. Raises AssertionError if that takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.002)


def _run(arguments: list[str], log: str, file_limit: int | None, uid: int | None, environment: dict | None) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]  # the server that this process was forked from may have a W&B of its own
    os.environ.update(environment or {})
    # as after exec: the server ignores Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if uid is not None:
        os.setuid(uid)
    run_script(train.main)
