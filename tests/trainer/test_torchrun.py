"""Several ranks: TrainingStep and train.py on gloo processes of a CPU, some of them under torchrun."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.multiprocessing as mp

import train
from tests.helpers import child, runs
from tests.helpers.models import adamw, assert_same, build, chrono, state_of, tokens, training_step
from trainer import distributed, interrupt
from trainer.distributed import World

RUN = dict(
    **dict(gradient_accumulation_steps=4, max_iters=40, lr_decay_iters=40, eval_interval=20, eval_iters=5),
    **dict(learning_rate=1e-3, min_lr=1e-4, dropout=0, use_noisy_top_k=False),
)


@pytest.fixture(scope="module")
def ranks_keys(keys):
    return lambda out, **changes: keys(out, **RUN | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, ranks_keys):
    """The run on one rank. Do not write to it."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train.main(ranks_keys(out)) == 0
    return out


def assert_close(a, b):
    """The losses of two runs agree up to rounding."""
    names = ("step", "train/loss", "val/loss", "train/aux_loss", "coherence/L0/layer")
    first, second = ([line.get(name, 0) for line in runs.metrics(out) for name in names] for out in (a, b))
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_and_evaluate_as_one_process(count, ranks_keys, alone, capfd, out, log):
    assert child.run_ranks(ranks_keys(out), count, log) == [0] * count
    assert_close(alone, out)
    assert log.read_text().count("\n  40 ") == 1  # one rank logs
    assert runs.config_of(out)["ranks"] == count
    decisions = [[d["expert_id"] for d in runs.lines(folder / "decisions.jsonl")] for folder in (alone, out)]
    assert decisions[0] == decisions[1] and len(decisions[0]) == 8
    evaluation = ranks_keys(alone, init_from="resume", eval_only=True)
    assert child.run_ranks(evaluation, count, log) == [0] * count
    assert train.main(evaluation) == 0
    assert log.read_text().splitlines()[-1] in capfd.readouterr().out


def test_a_resumed_run_is_bit_identical_with_as_many_ranks_and_close_with_fewer(ranks_keys, alone, tmp_path):
    whole, out, other, log = (tmp_path / name for name in ("whole", "out", "other", "log"))
    noisy = runs.NOISY | dict(max_iters=6, lr_decay_iters=6, eval_interval=3)
    assert child.run_ranks(ranks_keys(whole, **noisy), 2, log) == [0, 0]
    for changes in (dict(max_iters=3), dict(init_from="resume")):
        assert child.run_ranks(ranks_keys(out, **noisy | changes), 2, log) == [0, 0]
    first, second = (state["cpu"] for state in runs.checkpoint(out)["random"])
    assert not torch.equal(first, second)
    runs.assert_same_run(out, whole)
    assert child.run_ranks(ranks_keys(other, max_iters=20), 2, log) == [0, 0]
    assert train.main(ranks_keys(other, init_from="resume")) == 0
    assert_close(alone, other)


def test_a_signal_to_one_rank_saves_and_stops_all(ranks_keys, out, log):
    processes = child.start_ranks(ranks_keys(out, **runs.LONG), 2, log)
    child.wait_for_step(log, 5)
    assert child.stop(processes[1], signal.SIGTERM) == child.finish(processes[0]) == 128 + signal.SIGTERM
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] > 4


def test_a_rank_that_is_killed_ends_the_others_with_one_line(ranks_keys, out, log):
    processes = child.start_ranks(ranks_keys(out, **runs.LONG), 2, log)
    child.wait_for_step(log, 5)
    processes[1].kill()
    assert child.finish(processes[0], 30) == 2
    assert log.read_text().splitlines()[-1] == "error: rank 0 lost the other ranks: the rank that ended first says why"


ERRORS = [
    (dict(gradient_accumulation_steps=3), "3 micro-batches cannot be shared equally by 2 ranks"),
    (dict(no_such_key=1), "there is no setting 'no_such_key'"),
    (dict(dataset="no_such_data"), "no folder"),
]


@pytest.mark.parametrize(("changes", "expected"), ERRORS)
def test_an_error_of_a_user_is_reported_and_ends_all_ranks(changes, expected, ranks_keys, out, log):
    assert child.run_ranks(ranks_keys(out, **changes), 2, log) == [2, 2]
    errors = log.read_text().splitlines()
    assert any(line.startswith("error: ") and expected in line for line in errors), errors
    assert not any("Traceback" in line for line in errors)
    assert not (out / "metrics.jsonl").exists()


def test_a_missing_rank_or_half_of_torchruns_environment_gets_one_line(ranks_keys, monkeypatch, out, capsys):
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.datetime.timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in runs.error_of(train.main, ranks_keys(out))
    for name, value in dict(RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29517).items():
        monkeypatch.setenv(name, str(value))
    assert "rank 0 of 2 could not join the others" in runs.error_of(train.main, ranks_keys(out))
    assert "waits" not in capsys.readouterr().err
    # nor later
    child.wait_for(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()), 5)
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    assert "rank 0 of 2 could not join the others" in runs.error_of(train.main, ranks_keys(out))
    line = "rank 0 of 2 waits for the other ranks at localhost:29517, 0:00:01 at most"
    assert line in capsys.readouterr().err.splitlines()


def start_torchrun(arguments, log):
    """Start train.py on two ranks by torchrun. Returns torchrun's process and the ids of the ranks' after step 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--monitor-interval=0.1", "train.py", *arguments]
    with log.open("ab") as f:
        process = subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=f, stderr=f)
    child.wait_for_step(log, 1, 60)
    workers = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "train.py"], text=True).split()
    return process, [*map(int, workers)]


def test_ranks_save_and_end_when_torchrun_is_killed(ranks_keys, out, log):
    process, workers = start_torchrun(ranks_keys(out, **runs.LONG), log)
    process.kill()
    process.wait()
    try:
        child.wait_for(lambda: not any(map(interrupt._exists, workers)))
    finally:
        for worker in workers:
            if interrupt._exists(worker):
                os.kill(worker, signal.SIGKILL)
    assert runs.checkpoint(out)["iter_num"] == runs.steps(out)[-1] > 0
    text = log.read_text()
    assert "the program that started this run has ended" in text and "Traceback" not in text


def test_torchruns_restart_continues_from_the_checkpoint(ranks_keys, alone, out, log):
    process, workers = start_torchrun(ranks_keys(out, checkpoint_interval=5), log)
    child.wait_for_step(log, 12, 60)
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    assert_close(alone, out)
    history = runs.config_of(out)["history"]
    assert len(history) == 2 and history[1]["step"] >= 5


def test_a_restart_starts_again_from_the_same_weights_in_its_own_folder_only(ranks_keys, alone, monkeypatch, out):
    before = runs.snapshot(alone)
    command = ranks_keys(out, init_from=alone, max_iters=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    assert train.main(command) == 0
    first = runs.metrics(out, timeless=True)
    assert "holds a run already" in runs.error_of(train.main, command)
    for path in out.glob("*.pt"):
        path.unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(command) == 0
    assert runs.metrics(out, timeless=True) == first and runs.steps(out) == [0, 1, 2]
    assert "holds a run already" in runs.error_of(train.main, ranks_keys(alone, learning_rate=0.1))
    assert runs.snapshot(alone) == before


CONFIG = dict(eta=0.1, k_max=2.0, bridge_threshold=2e-4, prune_phi=0.9, prune_min_tokens=10, prune_min_updates=1)


def train_in(world, disturb=False):
    """Five steps of four micro-batches over all ranks. Returns all state, and the losses of the traces."""
    model, loop = build(chrono(**CONFIG), beta=0.5)
    forward, losses = world.wrap_ddp(model, torch.device("cpu")), []
    model.router_state.beta_coeff[0, 0] += 1e-6 * disturb
    options = dict(micro_batches=4 // world.world_size, forward=forward, world=world)
    step = training_step(model, loop, adamw(model), **options)
    for number in range(5):
        batches = [tokens(100 * number + i, batch=4) for i in range(world.rank, 4, world.world_size)]
        losses.append(step(batches, number).trace.cross_entropy)
    return state_of(model, loop) | {"losses": torch.stack(losses)}


def train_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2)
    torch.save([train_in(world), train_in(world, disturb=rank == 1)], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_bit_for_bit_and_with_one_process(tmp_path):
    mp.spawn(train_rank, args=(str(tmp_path),), nprocs=2)
    (first, disturbed), (second, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_same(first, second)
    assert first["lifecycle.open"].any() and first["router.relevance"].min() < 1
    torch.testing.assert_close(first, train_in(World()), rtol=1e-4, atol=1e-5)
    # a difference between ranks is not hidden by a broadcast of buffers
    assert not torch.equal(disturbed["router.beta_coeff"], other["router.beta_coeff"])


@pytest.mark.parametrize("bridge", [True, False])
def test_the_tensor_that_is_summed_for_the_state_does_not_depend_on_logging(bridge, monkeypatch):
    """With three ranks or more, the last bits of a sum depend on its offset in the tensor."""
    model, _ = build(chrono(**CONFIG, bridge=bridge))
    reduced = {True: [], False: []}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for logged, tensors in reduced.items():
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, tensors=tensors: tensors.append(x.clone()))
        trace = model(*tokens(1), return_trace=True, logged=logged)[2]
        summed = trace.summed_over_ranks()
        assert_same(summed.present(), trace.present())
        assert summed.summed_over_ranks() is summed
    assert len(reduced[False]) == 1 and len(reduced[True]) == 2
    assert torch.equal(reduced[False][0], reduced[True][0])
