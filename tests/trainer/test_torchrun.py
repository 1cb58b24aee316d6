"""train.py on several ranks, as torchrun starts it: gloo processes on a CPU."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import train
from tests.helpers import child
from tests.helpers.runs import ALL_ON, NOISY, ROOT, TINY, checkpoint, differing_state, lines, metrics, write_dataset
from trainer import distributed
from trainer.errors import UserError

RUN = dict(
    **dict(gradient_accumulation_steps=4, max_iters=50, lr_decay_iters=50, eval_interval=25, eval_iters=5),
    **dict(learning_rate=1e-3, min_lr=1e-4),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", 61)


@pytest.fixture(scope="module")
def keys(dataset):
    def arguments(out, **changes):
        settings = TINY | ALL_ON | {"dataset": dataset, "out_dir": out} | RUN | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    return arguments


def torchrun(arguments, count, log, *options):
    """Start train.py on `count` ranks; what they print goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as f:
        return subprocess.Popen([*command, "train.py", *arguments], cwd=ROOT, env=environment, stdout=f, stderr=f)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, keys):
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main(keys(out)) == 0
    return out


def largest_difference(a, b):
    """Of the losses of two runs, relative."""
    pairs = list(zip(metrics(a), metrics(b), strict=True))
    assert len(pairs) == 51
    names = ("train/loss", "val/loss", "train/aux_loss", "coherence/L0/layer")
    return max(abs(x[n] - y[n]) / abs(x[n]) for x, y in pairs for n in names if n in x)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_process_with_the_same_micro_batches(count, keys, alone, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    assert torchrun(keys(out), count, log).wait(120) == 0, log.read_text()[-2000:]
    assert largest_difference(alone, out) < 1e-5
    assert log.read_text().count("\nstep 50 ") == 1  # one rank tells
    assert json.loads((out / "config.json").read_text())["ranks"] == count


def test_a_run_goes_on_bit_for_bit_with_as_many_ranks_and_to_rounding_with_others(keys, alone, tmp_path):
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    noisy = dict(max_iters=10, lr_decay_iters=10, eval_interval=5) | NOISY
    assert torchrun(keys(whole, **noisy), 2, log).wait(120) == 0
    assert torchrun(keys(out, **noisy | dict(max_iters=5)), 2, log).wait(120) == 0
    assert len(checkpoint(out)["random"]) == 2
    assert torchrun(keys(out, **noisy, init_from="resume"), 2, log).wait(120) == 0, log.read_text()[-2000:]
    assert differing_state(out, whole) == set()
    assert metrics(out, timeless=True) == metrics(whole, timeless=True)
    other = tmp_path / "other"
    assert torchrun(keys(other, max_iters=25), 2, log).wait(120) == 0
    assert train.main(keys(other, init_from="resume")) == 0
    assert largest_difference(alone, other) < 1e-5
    assert "before 2: dropout and router noise are drawn anew" not in log.read_text()


def test_a_signal_to_any_rank_saves_and_ends_all(keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = torchrun(keys(out, max_iters=100_000, eval_interval=100_000), 2, log)
    child.wait_for(lambda: "step      5 " in log.read_text(), 60)
    os.kill(workers(process)[1], signal.SIGTERM)
    assert process.wait(40) != 0
    said = log.read_text()
    assert "stopped at step" in said and "--init_from=resume" in said
    assert checkpoint(out)["iter_num"] == metrics(out)[-1]["step"]


def workers(process):
    """The ranks' process ids under torchrun, in their order."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    return sorted(int(pid) for pid, parent, args in rows if int(parent) == process.pid and "train.py" in args)


def test_torchruns_restart_goes_on_from_the_checkpoint(keys, alone, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = torchrun(keys(out, checkpoint_interval=5), 2, log, "--max-restarts=2", "--monitor-interval=0.1")
    child.wait_for(lambda: "step 20 " in log.read_text(), 60)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    assert largest_difference(alone, out) < 1e-5
    history = json.loads((out / "config.json").read_text())["history"]
    assert len(history) == 2 and history[1]["step"] >= 10


def test_an_error_on_one_rank_ends_all_within_seconds_with_its_message(keys, dataset, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = torchrun(keys(out, max_iters=100_000, eval_interval=100_000), 2, log)
    child.wait_for(lambda: "step      5 " in log.read_text(), 60)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(30) != 0
    said = log.read_text()
    assert "Traceback" not in said.split("torch/distributed")[0]
    assert "lost the other ranks" in said or "stopped at step" in said


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(gradient_accumulation_steps=3), "3 micro-batches cannot be shared equally by 2 ranks"),
        (dict(no_such_key=1), "there is no setting 'no_such_key'"),
        (dict(dataset="no_such_data"), "no folder"),
    ],
)
def test_a_mistake_gets_its_line(changes, expected, keys, tmp_path):
    log = tmp_path / "log"
    assert torchrun(keys(tmp_path / "out", **changes), 2, log).wait(60) != 0
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert any(expected in line for line in errors), errors
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_missing_rank_gets_one_line(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.datetime.timedelta(seconds=2))
    for name, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29517).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="rank 0 of 2 could not meet the others"):
        train.main(keys(tmp_path / "out"))


def test_half_of_torchruns_environment_gets_one_line(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        train.main(keys(tmp_path / "out"))


@pytest.mark.slow
def test_evaluation_over_ranks_is_that_of_one_process(keys, alone, tmp_path, capfd):
    log = tmp_path / "log"
    arguments = keys(alone, init_from="resume", eval_only=True)
    assert torchrun(arguments, 2, log).wait(60) == 0
    assert train.main(arguments) == 0
    told = [line for line in log.read_text().splitlines() if line.startswith("validation loss")]
    assert told == [line for line in capfd.readouterr().out.splitlines() if line.startswith("validation loss")]
    assert len(told) == 1


@pytest.mark.slow
def test_decisions_are_told_once(keys, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    watched = dict(chrono_prune_phi=1, chrono_prune_min_tokens=0, chrono_prune_min_updates=1, max_iters=6)
    assert torchrun(keys(out, **watched), 2, log).wait(60) == 0
    found = [(d["step"], d["expert_id"], d["reason"], d["action"]) for d in lines(out / "decisions.jsonl")]
    assert found and len(found) == len(set(found))
    assert torch.equal(
        checkpoint(out)["chrono"]["lifecycle"]["open"], checkpoint(out)["chrono"]["lifecycle"]["reported"]
    )


@pytest.mark.slow
def test_a_restart_does_not_take_another_runs_folder_for_its_own(keys, alone, tmp_path):
    log = tmp_path / "log"
    before = {path.name: path.read_bytes() for path in alone.iterdir() if path.is_file()}
    process = torchrun(keys(alone, learning_rate=0.1), 2, log, "--max-restarts=1", "--monitor-interval=0.1")
    assert process.wait(60) != 0
    assert log.read_text().count("holds a run already") == 2  # at each attempt
    assert {path.name: path.read_bytes() for path in alone.iterdir() if path.is_file()} == before


def test_a_restart_before_the_first_checkpoint_starts_from_the_same_weights(keys, alone, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = [*keys(out, init_from=alone, max_iters=2, learning_rate=0, min_lr=0)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    assert train.main(arguments) == 0
    for path in out.glob("*.pt"):
        path.unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train.main(arguments) == 0
    assert f"weights: from {alone}" in capsys.readouterr().out
    assert [line["step"] for line in metrics(out)] == [0, 1, 2]
