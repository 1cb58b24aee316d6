"""Signals, the end of the parent process, and the lock that keeps a second run out."""

import errno
import os
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest

import train
from tests.helpers import child, runs
from trainer import interrupt, lock
from trainer.data import TokenData
from trainer.interrupt import PARENT, SIGNALS, Interrupt, ParentWatch
from trainer.runlog import RunLog


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_and_saves_it_for_resume(number, full_run, keys, resume, monkeypatch, capsys, out):
    steps, handlers = iter(range(1, 100)), [signal.getsignal(n) for n in SIGNALS]
    monkeypatch.setattr(RunLog, "advance", lambda log: signal.raise_signal(number) if next(steps) == 2 else None)
    assert train.main(keys(out)) == 128 + number
    assert "--init_from=resume" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] == 2
    assert resume(out) == 0
    runs.assert_same_run(out, full_run)


def test_an_evaluation_that_a_signal_interrupts_is_done_after_resume(full_run, keys, resume, monkeypatch, out):
    batches, original = [], TokenData.batch

    def batch(self, split, *rest):
        batches.append(split)
        if split == "val" and batches.count("val") == 3:  # the first of two batches of the evaluation at step 3
            signal.raise_signal(signal.SIGTERM)
        return original(self, split, *rest)

    monkeypatch.setattr(TokenData, "batch", batch)
    assert train.main(keys(out)) == 128 + signal.SIGTERM and batches.count("val") == 3
    assert runs.steps(out) == [0, 1, 2] and runs.checkpoint(out)["unfinished"]["step"] == 3
    assert resume(out) == 0
    assert batches.count("val") == 3 + 4  # of steps 3 and 6
    runs.assert_same_run(out, full_run)


@pytest.mark.parametrize(("output", "number"), [("pipe", signal.SIGINT), ("terminal", signal.SIGHUP)])
def test_a_signal_saves_and_sets_the_exit_status_though_nobody_reads_the_output(output, number, keys, tmp_path, out):
    """`... 2>&1 | tee log` and Ctrl-C, which ends tee first; a terminal that is closed."""
    if output == "pipe":
        log = tmp_path / "log"
        os.mkfifo(log)
        ends = [os.open(log, os.O_RDONLY | os.O_NONBLOCK)]
    else:
        ends = os.openpty()
        log = os.ttyname(ends[1])
    process = child.start(keys(out, **runs.LONG), log)
    child.wait_for(lambda: (out / "metrics.jsonl").exists() and len(runs.metrics(out)) > 3)
    for end in ends:
        os.close(end)
    assert child.stop(process, number) == 128 + number
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] > 1


def test_a_second_signal_stops_at_once_and_leaves_the_checkpoint_unchanged(half, keys, log):
    before = (half / "ckpt.pt").read_bytes()
    process = child.start(keys(half, init_from="resume", **runs.LONG), log, until_step=5)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):  # both arrive in one step
        os.kill(process.pid, number)
    assert child.stop(process, signal.SIGCONT) == 128 + signal.SIGTERM
    assert "stopped at once" in log.read_text() and "Traceback" not in log.read_text()
    assert (half / "ckpt.pt").read_bytes() == before


def test_with_several_ranks_a_second_signal_within_three_seconds_is_the_same_ctrl_c(monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt.os, "_exit", ended.append)
    with Interrupt(SimpleNamespace(world_size=2)):
        for now[0] in (10.0, 12.9, 13.1):
            assert not ended
            signal.raise_signal(signal.SIGINT)
    assert ended == [130]


def test_an_ignored_sighup_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as signals:
        signal.raise_signal(signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and signals.exit_status == 0


def test_a_run_whose_parent_ends_saves_and_stops(keys, out, log):
    parent = subprocess.Popen(["sleep", "600"])  # a parent with a shell in between
    process = child.start(keys(out, **runs.LONG), log, until_step=2, environment={PARENT: str(parent.pid)})
    time.sleep(0.7)  # longer than the interval of the checks
    assert "stopping" not in log.read_text()
    parent.kill()
    parent.wait()
    assert child.finish(process, 10) == 128 + signal.SIGTERM
    assert log.read_text().count("stopping after this step") == 1 and "Traceback" not in log.read_text()
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] > 1


def test_the_end_of_the_parent_is_a_sigterm_unless_a_signal_was_received(monkeypatch):
    sent, parent = [], [77]
    monkeypatch.setattr(interrupt, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(interrupt.os, "kill", lambda *call: sent.append(call))
    monkeypatch.setattr(interrupt.os, "getppid", lambda: parent[0])
    # the id of a parent that ended can belong to another process
    monkeypatch.setattr(interrupt, "_exists", lambda process: process == 77)
    monkeypatch.setenv(PARENT, "77")
    for received in (0, signal.SIGINT):
        parent[0] = 77
        with ParentWatch() as watch:
            watch.interrupt = SimpleNamespace(received=received)
            time.sleep(0.05)
            assert len(sent) == bool(received)
            parent[0] = 1
            time.sleep(0.05)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_rank_that_waits_for_others_ends_with_its_parent(keys, out, log):
    parent = subprocess.Popen(["sleep", "600"])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        place = dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]))
    rank = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2") | place
    process = child.start(keys(out), log, environment=rank | {PARENT: str(parent.pid)})
    parent.kill()
    parent.wait()
    assert child.finish(process, 20) == -signal.SIGTERM
    assert log.read_text().split() == "the program that started this run has ended".split()


def test_a_parent_that_is_not_a_process_id_gets_one_line(keys, monkeypatch, out):
    monkeypatch.setenv(PARENT, "-1")
    assert f"{PARENT}='-1'" in runs.error_of(train.main, keys(out))


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_alive(keys, tmp_path, out, log):
    other = tmp_path / "other"
    first = child.start(keys(out, **runs.LONG, checkpoint_interval=1), log, until_step=5)
    assert child.run(keys(out, init_from="resume"), other) == 2
    (line,) = other.read_text().splitlines()
    assert line.startswith("error: another process is writing to") and str(first.pid) in line
    assert child.run(keys(out, init_from="resume", eval_only=True, max_iters=100_000), other) == 0
    assert child.stop(first, signal.SIGKILL) == -signal.SIGKILL
    assert child.run(keys(out, init_from="resume", max_iters=runs.steps(out)[-1] + 5), other) == 0


def test_a_file_system_without_locks_gets_one_line(start, monkeypatch, out, capsys):
    def acquire(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", acquire)
    assert start(out) == 0
    line = f"{out} is on a file system without locks: a second process cannot be kept out"
    assert capsys.readouterr().out.splitlines().count(line) == 1 and runs.checkpoint(out)["iter_num"] == runs.STEPS
