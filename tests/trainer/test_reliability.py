"""Faults as they happen: full disks, damaged files, signals, a second run, numbers that go bad."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.helpers import child
from tests.helpers.runs import (
    ALL_ON,
    NOISY,
    ROOT,
    STEPS,
    TINY,
    VOCAB,
    checkpoint,
    differing_state,
    leaves,
    lines,
    metrics,
    one_line,
    snapshot,
    write_dataset,
)
from trainer import checkpoint as checkpoints
from trainer import signals
from trainer.checkpoint import Checkpointer
from trainer.errors import UserError
from trainer.files import JsonLines
from trainer.guard import NonFiniteGuard


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", VOCAB)


@pytest.fixture(scope="module")
def keys(dataset):
    """The command line of a tiny run with every step and source of chance."""

    def arguments(out, **changes):
        settings = TINY | ALL_ON | NOISY | {"dataset": dataset, "out_dir": out} | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    return arguments


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, keys):
    out = tmp_path_factory.mktemp("runs") / "full"
    assert train.main(keys(out)) == 0
    return out


# Damage


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[path], b[path]) if isinstance(a[path], torch.Tensor) else a[path] == b[path] for path in a
    )


def cut_at(content, place):
    return content[:place]


def flipped_at(content, place):
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut_at, flipped_at])
def test_a_checkpoint_damaged_anywhere_gives_way_to_the_one_before(damage, full_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    content = (out / "ckpt.pt").read_bytes()
    previous = checkpoints.load(out / "ckpt_previous.pt")
    assert previous["iter_num"] == 3
    places = random.Random(7).sample(range(len(content)), 50)
    # and where a file is most itself: its beginning, the archive's directory, the digest
    for place in [*places, 0, 1, *range(len(content) - 100, len(content))]:
        (out / "ckpt.pt").write_bytes(damage(content, place))
        found, notes, damaged = checkpoints.newest(out)
        if damaged:
            assert damaged == [out / "ckpt.pt"]
            assert len(notes) == 2 and "ckpt.pt is damaged" in notes[0] and "ckpt_previous.pt, step 3" in notes[1]
            assert same(found, previous)
        else:  # only what says that there is a digest is gone
            assert place >= len(content) - 75
            assert same(found, checkpoint(full_run))


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(full_run, keys, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    damaged = cut_at((out / "ckpt.pt").read_bytes(), 5000)
    (out / "ckpt.pt").write_bytes(damaged)
    assert train.main(keys(out, init_from="resume")) == 0
    said = capsys.readouterr().out
    assert "ckpt.pt is damaged" in said and "going on from" in said and "step 3" in said
    assert differing_state(out, full_run) == set()
    assert metrics(out, timeless=True) == metrics(full_run, timeless=True)
    assert (out / "ckpt.pt.damaged").read_bytes() == damaged
    assert checkpoints.load(out / "ckpt_previous.pt")["iter_num"] == 3  # the damaged one took no good one's place


def test_a_checkpoint_that_is_missing_gives_way_to_the_one_before(full_run, keys, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    (out / "ckpt.pt").unlink()
    assert train.main(keys(out, init_from="resume")) == 0
    assert differing_state(out, full_run) == set()


def test_the_last_two_and_the_best_are_kept(keys, tmp_path):
    out, data = tmp_path / "out", write_dataset(tmp_path / "data", 8)  # 8 of 61 tokens: the loss falls, to a noisy end
    (data / "meta.json").write_text(json.dumps({"vocab_size": VOCAB}))
    more = dict(max_iters=40, eval_interval=4, checkpoint_interval=5, learning_rate=0.03, decay_lr=False)
    assert train.main(keys(out, dataset=data, **more)) == 0
    found = {path.name: checkpoints.load(path) for path in out.glob("*.pt")}
    assert {name: c["iter_num"] for name, c in found.items() if name != "ckpt_best.pt"} == {
        "ckpt.pt": 40,
        "ckpt_previous.pt": 36,
    }
    losses = {line["step"]: line["val/loss"] for line in metrics(out) if "val/loss" in line and line["step"]}
    best = min(losses, key=losses.get)
    assert found["ckpt_best.pt"]["iter_num"] == best
    assert found["ckpt_best.pt"]["best_val_loss"] == losses[best]


def test_nanomoes_checkpoint_is_checked_by_its_own_checksums(tmp_path):
    content = (ROOT / "tests" / "golden" / "nanomoe_ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(flipped_at(content, len(content) // 2))
    with pytest.raises(checkpoints.Damaged):
        checkpoints.load(tmp_path / "ckpt.pt")


# Saving


def state_of(step, size=1000):
    return {"model": {"w": torch.full((size,), float(step))}, "optimizer": {}, "model_args": {}, "iter_num": step}


def keeper_of(out, said, interval=0, minutes=0.0, before=lambda: None):
    return Checkpointer(out, said.append, before, interval, minutes)


def test_a_save_writes_the_state_as_it_was_when_it_was_called(tmp_path):
    state = state_of(1, 1_000_000)
    keeper = keeper_of(tmp_path, [])
    keeper.save(state)
    state["model"]["w"].fill_(9)
    keeper.wait()
    assert (checkpoint(tmp_path)["model"]["w"] == 1).all()


def test_saving_holds_training_up_for_no_longer_than_copying_takes(tmp_path):
    gate = []
    keeper = keeper_of(tmp_path, [], interval=1, before=lambda: child.wait_for(lambda: gate))
    keeper.save(state_of(1))  # the disk hangs, and save has returned
    assert keeper.busy and keeper.saved_step is None
    assert not keeper.due(2)  # a save that would have to wait is put off,
    gate.append("open")
    keeper.wait()
    assert keeper.saved_step == 1
    assert keeper.due(2)  # and not forgotten


def test_two_names_of_one_tensor_are_saved_once(tmp_path):
    tied = torch.zeros(100_000)
    checkpoints.write(tmp_path, checkpoints.copied(state_of(1) | {"model": {"a": tied, "b": tied}}))
    assert (tmp_path / "ckpt.pt").stat().st_size < 500_000


def test_checkpoints_come_by_steps_and_by_time(tmp_path, monkeypatch):
    by_steps = keeper_of(tmp_path, [], interval=4)
    saved = []
    for step in range(1, 10):
        if by_steps.due(step):
            by_steps.save(state_of(step))
            by_steps.wait()
            saved.append(step)
    assert saved == [4, 8]
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    by_time = keeper_of(tmp_path, [], minutes=0.5)
    saved = []
    for step in range(1, 10):
        now[0] += 12
        if by_time.due(step):
            by_time.save(state_of(step))
            by_time.wait()
            saved.append(step)
    assert saved == [3, 6, 9]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_never_enters_a_checkpoint(bad, tmp_path):
    said = []
    keeper = keeper_of(tmp_path, said)
    keeper.save(state_of(1))
    keeper.save(state_of(2) | {"optimizer": {"state": {0: {"exp_avg": torch.tensor([0.0, bad])}}}})
    keeper.wait()
    assert checkpoint(tmp_path)["iter_num"] == keeper.saved_step == 1
    (line,) = said
    assert "optimizer/state/0/exp_avg" in line and "unprotected" in line


def test_a_full_disk_is_told_once_and_training_goes_on_until_there_is_room_again(full_run, keys, tmp_path):
    """No file may grow beyond 20 kB, which stops checkpoints and then logs; at step 60 there is room again."""
    many = dict(max_iters=240, lr_decay_iters=240, eval_interval=20, log_interval=5)
    calm, out, log = tmp_path / "calm", tmp_path / "out", tmp_path / "log"
    assert child.finish(child.start(keys(calm, **many), tmp_path / "calm.log")) == 0
    process = child.start(keys(out, **many), log, file_limit=20_000)
    child.wait_for(lambda: log.exists() and "\nstep  60 " in log.read_text())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert child.finish(process) == 0
    said = log.read_text().splitlines()
    told = [line for line in said if "cannot" in line or "again" in line or "that waited" in line]
    assert len(told) == 4, told
    assert told[0].startswith("cannot save step 20 in ") and "File too large; " in told[0] and "unprotected" in told[0]
    assert told[1].startswith("cannot write ") and "metrics.jsonl: File too large; " in told[1]
    saved, waited = sorted(told[2:])
    assert waited == "the lines that waited are written"
    assert saved.startswith("saved step ") and saved.endswith("protected again")
    assert differing_state(out, calm) == set()
    assert metrics(out, timeless=True) == metrics(calm, timeless=True)


def test_a_disk_that_stays_full_leaves_the_older_checkpoint_and_exit_status_1(keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    assert child.finish(child.start(keys(out, max_iters=3), log)) == 0
    before = (out / "ckpt.pt").read_bytes()
    limit = (out / "metrics.jsonl").stat().st_size + 100_000
    assert limit < len(before)
    assert child.finish(child.start(keys(out, init_from="resume"), log, file_limit=limit)) == 1
    assert (out / "ckpt.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))
    assert [line["step"] for line in metrics(out)] == list(range(STEPS + 1))
    last = log.read_text()
    assert "the state of step 6 is not saved (File too large); the newest is of step 3" in last
    assert "Traceback" not in last


def test_a_folder_that_cannot_be_written_gets_one_line(keys, dataset, tmp_path):
    if os.getuid() != 0:
        uid = None
    else:
        uid = 65534
        for folder in [dataset, *dataset.parents]:
            if str(folder).startswith("/tmp/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o555)
    log = tmp_path / "log"
    log.touch()
    log.chmod(0o666)
    assert child.finish(child.start(keys(tmp_path / "closed" / "out"), log, uid=uid)) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: cannot write to /") and "Permission denied" in line


# Signals


def begun(log, step=2):
    return lambda: log.exists() and re.search(rf"^step +{step} ", log.read_text(), flags=re.MULTILINE)


LONG = dict(max_iters=100_000, eval_interval=100_000, log_interval=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_ends_with_its_status(number, keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = child.start(keys(out, **LONG), log)
    child.wait_for(begun(log))
    sent = time.monotonic()
    os.kill(process.pid, number)
    assert child.finish(process, 10) == 128 + number
    assert time.monotonic() - sent < 10
    said = log.read_text()
    assert "stopping after this step" in said and "--init_from=resume" in said and "Traceback" not in said
    assert checkpoint(out)["iter_num"] == metrics(out)[-1]["step"] > 1


def test_a_signal_during_an_evaluation_leaves_it_to_the_next_start(full_run, keys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    batches = []
    original = train.TokenData.batch

    def batch(self, split, *rest):
        batches.append(split)
        if batches.count("val") == 3:  # the first of two batches of the evaluation at step 3
            signal.raise_signal(signal.SIGTERM)
        return original(self, split, *rest)

    monkeypatch.setattr(train.TokenData, "batch", batch)
    assert train.main(keys(out)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert [line["step"] for line in metrics(out)] == [0, 1, 2]
    assert checkpoint(out)["unfinished"]["step"] == 3
    assert train.main(keys(out, init_from="resume")) == 0
    assert differing_state(out, full_run) == set()
    assert metrics(out, timeless=True) == metrics(full_run, timeless=True)


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint_whole(keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    # the evaluation at step 2 lasts for minutes
    slow = dict(max_iters=4, eval_interval=2, eval_iters=2, checkpoint_interval=1)
    assert (
        child.finish(
            child.start(
                keys(
                    out,
                    **slow,
                ),
                log,
            )
        )
        == 0
    )
    process = child.start(
        keys(out, init_from="resume", max_iters=10**6, eval_interval=10**6, batch_size=4000), log
    )  # steps of seconds
    child.wait_for(lambda: log.read_text().count("resume:") >= 3)
    before = (out / "ckpt.pt").read_bytes()
    time.sleep(0.5)
    while process.is_alive():  # two that come too close are one to the system
        os.kill(process.pid, signal.SIGINT)
        process.join(0.05)
    assert child.finish(process, 10) == 128 + signal.SIGINT
    assert "stopped at once" in log.read_text() and "Traceback" not in log.read_text()
    checkpoints.load(out / "ckpt.pt")
    assert (out / "ckpt.pt").read_bytes() == before


STARTER = """
import os, subprocess, sys
environment = os.environ | {"CHRONO_STOP_WITH_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"}
with open(sys.argv[1], "ab") as log:
    process = subprocess.Popen([sys.executable, "train.py", *sys.argv[2:]], env=environment, stdout=log, stderr=log,
                               start_new_session=True)
print(process.pid, flush=True)
process.wait()
"""


def test_a_run_whose_parent_was_killed_saves_and_ends(keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", STARTER, log, *keys(out, **LONG)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    run = int(parent.stdout.readline())
    try:
        child.wait_for(begun(log), 60)
        time.sleep(0.7)  # the parent was looked at, and is there
        assert "stopping" not in log.read_text()
        parent.kill()
        child.wait_for(lambda: "--init_from=resume" in log.read_text() and not (out / ".lock.holder").exists(), 10)
    finally:
        parent.kill()
        parent.communicate()
        with contextlib.suppress(OSError):
            os.kill(run, signal.SIGKILL)
    assert log.read_text().count("stopping after this step") == 1 and "Traceback" not in log.read_text()
    assert checkpoint(out)["iter_num"] == metrics(out)[-1]["step"] > 1


def test_a_process_between_a_run_and_its_parent_does_not_end_the_run(monkeypatch):
    """A shell or torchrun, say: the process that is named is watched, alive or not."""
    sent = []
    monkeypatch.setattr(signals, "POLL", 0.001)
    monkeypatch.setenv("CHRONO_STOP_WITH_PARENT", str(os.getpid()))  # not the parent of this process, but alive
    kill = os.kill
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append(number) if number else kill(pid, number))
    with signals.caught_signals():
        time.sleep(0.05)
    assert not sent
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("CHRONO_STOP_WITH_PARENT", str(gone.pid))
    with signals.caught_signals():
        child.wait_for(lambda: sent, 5)
    assert sent == [signal.SIGTERM]


def test_a_signal_before_the_end_of_the_parent_is_the_only_one(monkeypatch):
    sent = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(signals, "_exists", lambda process: False)
    monkeypatch.setattr(signals, "POLL", 0.001)
    for caught in ([signal.SIGINT], []):
        signals._stop_with(os.getppid() + 1, caught, threading.Event())
    assert sent == [(os.getpid(), signal.SIGTERM)]
    ended = threading.Event()
    threading.Timer(0.05, ended.set).start()
    signals._stop_with(os.getppid(), [], ended)
    assert len(sent) == 1


@pytest.mark.parametrize("value", ["x", "-1"])
def test_a_parent_that_is_no_process_id_gets_one_line(value, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("CHRONO_STOP_WITH_PARENT", value)
    with pytest.raises(UserError) as error:
        train.main(keys(tmp_path / "out"))
    assert "CHRONO_STOP_WITH_PARENT" in one_line(error)


# Two runs


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_alive(keys, tmp_path):
    out, log, other = tmp_path / "out", tmp_path / "log", tmp_path / "other"
    first = child.start(keys(out, **LONG, checkpoint_interval=1), log)
    child.wait_for(begun(log, 5))
    second = child.start(keys(out, init_from="resume"), other)
    assert child.finish(second) == 2
    (line,) = other.read_text().splitlines()
    assert line.startswith("error: another process is writing to") and str(first.pid) in line
    first.kill()
    assert child.finish(first) == -9
    count = metrics(out)[-2]["step"]
    assert child.finish(child.start(keys(out, init_from="resume", max_iters=count + 5), other)) == 0
    assert metrics(out)[-1]["step"] == count + 5


# Numbers that go bad


def poison(monkeypatch, steps, where):
    """Make loss or a gradient NaN in these steps, counted from 1."""
    count = [0]
    original = train.GPT.forward

    def forward(self, idx, targets=None, **asked):
        if not self.training:
            return original(self, idx, targets, **asked)
        count[0] += 1
        step = (count[0] + 1) // 2  # of two micro-batches
        logits, loss, trace = original(self, idx, targets, **asked)
        if step in steps and where == "loss":
            trace.cross_entropy = trace.cross_entropy * torch.nan
            loss = loss * torch.nan
        elif step in steps:
            weight = dict(self.named_parameters())[where]
            if count[0] % 2:
                weight.register_hook(lambda grad: grad * torch.nan if step in steps else grad)
        return logits, loss, trace

    monkeypatch.setattr(train.GPT, "forward", forward)


def test_a_bad_step_changes_nothing_but_the_time_and_is_told_by_what_was_bad_first(keys, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    poison(monkeypatch, {4}, "loss")
    assert train.main(keys(out, checkpoint_interval=1, log_interval=2, eval_interval=100)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert said == ["step 4: skipped 1 step: the loss was not finite in step 4 (1 in all)"]
    assert [line["train/skipped"] for line in metrics(out) if "train/skipped" in line] == [0, 1, 1]


@pytest.mark.parametrize("where", ["loss", "transformer.h.2.mlp.experts.c_fc"])
def test_bad_steps_leave_weights_optimizer_and_loop_as_they_were(where, keys, tmp_path, monkeypatch, capsys):
    good, out = tmp_path / "good", tmp_path / "out"
    options = dict(eval_interval=100, log_interval=100, decay_lr=False)
    train.main(keys(good, max_iters=3, **options))
    poison(monkeypatch, {4, 5, 6}, where)
    assert train.main(keys(out, **options)) == 0
    name = "the loss" if where == "loss" else f"the gradient of {where}"
    assert f"skipped 3 steps: {name} was not finite in step 4 (3 in all)" in capsys.readouterr().out
    moved = differing_state(out, good)
    clocks = {"/iter_num", "/random/0/cpu", "/chrono/coherence/step"}
    told = {path for path in moved if path.startswith(("/guard", "/lines", "/unfinished"))}
    assert moved - told <= clocks, moved
    assert clocks <= moved


def test_ten_bad_steps_in_a_row_end_the_run_with_the_last_good_state_saved(keys, tmp_path, monkeypatch, capsys):
    good, out = tmp_path / "good", tmp_path / "out"
    options = dict(eval_interval=100, log_interval=4, decay_lr=False)
    train.main(keys(good, **(options | dict(max_iters=2))))
    poison(monkeypatch, set(range(3, 100)), "loss")
    assert train.main(keys(out, **options, max_iters=40)) == 1
    said = capsys.readouterr().out
    assert "Try a lower learning_rate" in said and "stopped at step 12" in said
    moved = differing_state(out, good)
    assert not [path for path in moved if path.startswith(("/model", "/optimizer"))]
    monkeypatch.undo()
    assert train.main(keys(out, **options, max_iters=40, init_from="resume")) == 0  # the cause is gone: it goes on
    assert metrics(out)[-1]["train/skipped"] == 10


def test_the_norm_of_the_gradient_is_torchs():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    model(torch.randn(4, 7)).square().sum().backward()
    norm = torch.linalg.vector_norm(NonFiniteGuard(model).norms())
    assert torch.equal(norm, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def test_a_scalers_state_is_part_of_the_run(keys):
    """float16 needs a GPU; what is saved and restored of its scaler is the same on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([p], fused=True)
    for gradient in (1.0, float("inf"), 1.0):
        scaler.scale(p * gradient).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(checkpoints.copied(scaler.state_dict()))
    assert again.get_scale() == scaler.get_scale() == 4.0 and again.state_dict() == scaler.state_dict()


# Data


def test_data_that_has_changed_since_the_run_began_is_refused(keys, tmp_path):
    data = write_dataset(tmp_path / "data", VOCAB)
    (data / "meta.json").write_text(json.dumps({"vocab_size": VOCAB}))
    out = tmp_path / "out"
    train.main(keys(out, dataset=data, max_iters=3))
    before = snapshot(out)
    content = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(content[2:] + content[:2])
    with pytest.raises(UserError) as error:
        train.main(keys(out, dataset=data, init_from="resume"))
    assert all(part in one_line(error) for part in ("train.bin", "has changed since the run began", "sha256"))
    assert snapshot(out) == before
    (data / "train.bin").write_bytes(content)
    assert train.main(keys(out, dataset=data, init_from="resume")) == 0


def test_other_data_by_intention_is_allowed_and_told(keys, tmp_path, capsys):
    out, other = tmp_path / "out", write_dataset(tmp_path / "other", VOCAB, seed=9)
    train.main(keys(out, max_iters=3))
    assert train.main(keys(out, dataset=other, init_from="resume")) == 0
    assert f"resume: dataset={other}" in capsys.readouterr().out


def test_a_token_beyond_the_vocabulary_anywhere_is_found_before_the_run_begins(keys, tmp_path):
    data = write_dataset(tmp_path / "data", VOCAB)
    (data / "meta.json").write_text(json.dumps({"vocab_size": VOCAB}))
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    tokens[-1] = VOCAB
    tokens.tofile(data / "val.bin")
    with pytest.raises(UserError) as error:
        train.main(keys(tmp_path / "out", dataset=data))
    assert all(part in one_line(error) for part in ("val.bin", f"token id {VOCAB}"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_meta_json_does_not_describe_is_refused(keys, tmp_path):
    data = write_dataset(tmp_path / "data", VOCAB)
    (data / "train.bin").write_bytes((data / "val.bin").read_bytes())
    with pytest.raises(UserError) as error:
        train.main(keys(tmp_path / "out", dataset=data))
    assert "train.bin is not the file that" in one_line(error)


# Logs


def test_lines_that_wait_are_written_in_order_and_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, None, 0)

    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, content):
            if self.room <= 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(content[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    log.write({"step": 1})
    log.file = Full(log.file, 5)
    for step in (2, 3):
        with pytest.raises(OSError):
            log.write({"step": step})
    assert [line["step"] for line in lines(path)] == [1]
    log.file.room = 10**6
    log.write({"step": 4})
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4] and log.count == 4


# W&B, and its real process


def core_of(process):
    """The process id of W&B's server that a run started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(") ")
            if "wandb-core" in name and int(rest.split()[1]) == process.pid:
                return int(stat.parent.name)
    return None


@pytest.fixture
def with_wandb(keys, tmp_path):
    """Start a run that logs to W&B offline; returns its process, W&B's, its folder and what it prints."""
    started = []

    def start(**changes):
        out, log = tmp_path / "out", tmp_path / "log"
        options = LONG | dict(wandb_log=True, max_iters=400, log_interval=5) | changes
        process = child.start(keys(out, **options), log, environment={"WANDB_MODE": "offline", "HOME": str(tmp_path)})
        child.wait_for(begun(log, 20))
        started.append(core_of(process))
        return process, started[0], out, log

    yield start
    for core in filter(None, started):
        with contextlib.suppress(OSError):
            os.kill(core, signal.SIGKILL)


def about_wandb(log):
    return [line for line in log.read_text().splitlines() if line.startswith("W&B") or "Traceback" in line]


def test_when_wandbs_process_dies_training_goes_on_and_says_so_once(with_wandb):
    process, core, out, log = with_wandb()
    os.kill(core, signal.SIGKILL)
    assert child.finish(process) == 0
    begin, told = about_wandb(log)
    assert "offline" in begin and "could not log" in told and "going on without it" in told
    assert metrics(out)[-1]["step"] == 400


@pytest.mark.slow
def test_a_full_disk_in_wandbs_folder_is_told_once_and_training_goes_on(with_wandb):
    process, core, out, log = with_wandb()
    resource.prlimit(core, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert child.finish(process) == 0
    begin, told = about_wandb(log)
    assert "offline" in begin and "is not whole (file too large); metrics.jsonl is" in told
    assert metrics(out)[-1]["step"] == 400


@pytest.mark.slow
def test_a_wandb_that_hangs_does_not_hold_up_a_run_that_is_told_to_stop(with_wandb):
    process, core, out, log = with_wandb(max_iters=100_000)
    os.kill(core, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGTERM)
    assert child.finish(process, 10) == 128 + signal.SIGTERM
    _, told = about_wandb(log)
    assert "could not finish" in told and "wandb sync" in told
    assert checkpoint(out)["iter_num"] == metrics(out)[-1]["step"] or checkpoint(out)["iter_num"] > 20


def test_a_resumed_offline_run_names_the_folders_of_all_its_starts(keys, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    assert train.main(keys(out, wandb_log=True, max_iters=3)) == 0
    assert train.main(keys(out, wandb_log=True, init_from="resume")) == 0
    folders = sorted(str(path) for path in out.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(checkpoint(out)["wandb_id"] in folder for folder in folders)
    assert f"to upload later: wandb sync {' '.join(folders)}" in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["pipe", "terminal"])
def test_a_signal_whose_message_nobody_can_read_saves_all_the_same(gone, keys, tmp_path):
    """`... 2>&1 | tee log` and Ctrl-C, which ends tee first; a terminal that closes."""
    out = tmp_path / "out"
    command = [sys.executable, "train.py", *keys(out, **LONG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if gone == "pipe":
        read, write = os.pipe()
    else:
        read, write = os.openpty()
    number = signal.SIGINT if gone == "pipe" else signal.SIGHUP
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=write, stdout=write, stderr=write, start_new_session=True
    )
    try:
        os.close(write)
        threading.Thread(target=lambda: child.wait_for(lambda: not drain(read)), daemon=True).start()
        child.wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out / "metrics.jsonl")) > 3, 60)
        os.close(read)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
    assert checkpoint(out)["iter_num"] == metrics(out)[-1]["step"]


def drain(handle):
    try:
        return os.read(handle, 1 << 16)
    except OSError:
        return b""


def test_a_scaler_does_not_take_a_bad_step_that_the_guard_skips():
    """float16: a loss that is not finite may have gradients that are."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    scaler.update()
    assert torch.equal(p.detach(), torch.ones(3)) and scaler.get_scale() == 8.0
    source = (ROOT / "train.py").read_text()
    assert "scaler.step(" not in source.replace("not scaler.step()", "")  # it puts its own found_inf in the place


@pytest.mark.parametrize("key", ["out_dir", "init_from", "dataset"])
def test_a_path_that_is_too_long_gets_one_line(key, keys, tmp_path):
    with pytest.raises(UserError) as error:
        train.main(keys(tmp_path / "out", **{key: "x" * 300}))
    one_line(error)
