"""Weights & Biases: offline without a login or network, and never the reason that a run ends or waits."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from tests.helpers import child, runs
from trainer import errors, wandb_run
from trainer.runlog import wandb_identity
from trainer.settings import from_arguments


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B as on a machine without a login, with fresh settings."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def fake_run(wandb, monkeypatch):
    """Stands for wandb's run."""
    run = MagicMock(id="abc", url="http://127.0.0.1:9/abc")
    run.settings.sync_dir = "nowhere"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", MagicMock(return_value=run))
    return run


def about_wandb(capfd):
    return [line for line in "".join(capfd.readouterr()).splitlines() if re.search("w&b|wandb", line, re.IGNORECASE)]


def test_without_a_login_it_is_offline_and_one_line_has_the_command_to_upload(start, out, wandb, capfd):
    assert start(out, **runs.ALL_ON, wandb_log=True, max_iters=3) == 0
    (line,) = about_wandb(capfd)
    assert "offline (not logged in" in line
    wandb.teardown()  # W&B's process writes the last records when it ends
    (record,) = out.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert all(name.encode() in content for name in runs.metrics(out)[-1])
    # a resumed run has the same id, and one folder per start
    assert start(out, **runs.ALL_ON, wandb_log=True, init_from="resume") == 0
    (line,) = about_wandb(capfd)
    folders = sorted(out.glob("wandb/offline-run-*"))
    assert line.endswith(f"wandb sync {' '.join(map(str, folders))}")
    name = f"run-{runs.checkpoint(out)['wandb_id']}.wandb"
    assert [[f.name for f in folder.glob("*.wandb")] for folder in folders] == [[name]] * 2


def test_with_a_login_but_no_network_it_is_offline_after_a_few_seconds(start, out, wandb, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    before = time.monotonic()
    assert start(out, wandb_log=True) == 0 and time.monotonic() - before < 15
    (line,) = about_wandb(capfd)
    assert "offline (http://127.0.0.1:9 cannot be reached)" in line


@pytest.mark.parametrize(("failing", "verb"), [("define_metric", "start"), ("log", "log"), ("finish", "finish")])
def test_a_failure_is_reported_once_and_training_continues(failing, verb, start, out, fake_run, monkeypatch, capfd):
    monkeypatch.setattr(errors, "_exit_handlers_run", [True])
    getattr(fake_run, failing).side_effect = ConnectionError("the first line\nthe second")
    assert start(out, wandb_log=True) == 0 and runs.steps(out)[-1] == runs.STEPS
    calls = ["define_metric", *["log"] * (runs.STEPS + 1), "finish"]
    assert [call[0] for call in fake_run.method_calls] == calls[: calls.index(failing) + 1]
    (line,) = (line for line in about_wandb(capfd) if "could not" in line)
    assert line == f"W&B: could not {verb} (ConnectionError: the first line); continuing without it"
    assert errors._exit_handlers_run == [False]  # those of W&B would hang


def test_a_server_that_does_not_answer_is_reported_once(start, out, fake_run, monkeypatch, capfd):
    answers, before = threading.Event(), threading.enumerate()

    def log(*args, **options):
        answers.wait(10)
        raise ConnectionError("too late")

    fake_run.log.side_effect = log
    monkeypatch.setattr(wandb_run, "MAX_QUEUED", 3)
    assert start(out, wandb_log=True) == 0
    answers.set()
    for thread in set(threading.enumerate()) - {*before}:
        thread.join(10)
    (reported,) = (line for line in about_wandb(capfd) if "could not" in line)
    assert "could not keep up (TimeoutError: 3 calls are waiting)" in reported


def test_a_machine_without_wandb_trains_and_reports_it_once(start, out, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert start(out, wandb_log=True) == 0
    (line,) = about_wandb(capfd)
    assert "continuing without it" in line and runs.steps(out)[-1] == runs.STEPS


def test_it_gets_the_lines_of_metrics_jsonl_and_config_json(half, resume, wandb, fake_run):
    (half / "decisions.jsonl").unlink()
    assert resume(half, wandb_log=True, learning_rate=5e-3) == 0
    lines = [{k: v for k, v in line.items() if v is not None} for line in runs.metrics(half)[4:]]
    assert [(call.args[0], call.kwargs["step"]) for call in fake_run.log.call_args_list] == list(zip(lines, (4, 5, 6)))
    config = runs.config_of(half)
    assert wandb.init.call_args.kwargs["config"] == config and config["incomplete"]
    assert config["history"][1]["changed"]["learning_rate"] == [1e-2, 5e-3]


def test_runs_with_beta_on_and_off_share_a_group_and_differ_in_job_type():
    slice, beta_off = (str(runs.ROOT / "config" / name) for name in ("vertical_slice.py", "beta_off.py"))
    commands = [slice], [beta_off], [slice, "--seed=2"], [slice, "--n_exp=16"]
    on, off, other_seed, other_shape = (wandb_identity(from_arguments(command)) for command in commands)
    assert on["group"] == off["group"] == other_seed["group"] != other_shape["group"]
    assert on["project"] == off["project"] and on["name"] != off["name"] and on["tags"] != other_seed["tags"]
    assert on["job_type"] == other_seed["job_type"] != off["job_type"]


DIES = lambda server: os.kill(server, signal.SIGKILL), "could not log .*; continuing without it"
HANGS = lambda server: os.kill(server, signal.SIGSTOP), "could not finish .*wandb sync"
DISK_FULL = lambda server: child.set_file_limit(server, 20_000), "is incomplete .file too large"


@pytest.mark.parametrize(
    "fault", [DIES, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (HANGS, DISK_FULL))]
)
def test_a_fault_of_its_process_is_reported_once_and_training_continues(fault, keys, out, log, tmp_path):
    (plant, expected), is_stopped = fault, fault is HANGS
    command = keys(out, wandb_log=True, eval_interval=100_000, max_iters=100_000 if is_stopped else 100)
    process = child.start(command, log, 2, environment={"WANDB_MODE": "offline", "HOME": str(tmp_path)})
    server = int(subprocess.check_output(["pgrep", "-P", str(process.pid), "wandb-core"]))
    try:
        plant(server)
        status = child.stop(process, signal.SIGTERM) if is_stopped else child.finish(process)
    finally:
        with contextlib.suppress(OSError):
            os.kill(server, signal.SIGKILL)
    assert status == (128 + signal.SIGTERM if is_stopped else 0)
    first, failure = (line for line in log.read_text().splitlines() if line.startswith("W&B") or "Traceback" in line)
    assert "offline" in first and re.search(expected, failure)
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] and (is_stopped or runs.steps(out)[-1] == 100)
