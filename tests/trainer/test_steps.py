"""The training loop: its steps, learning rate, evaluations and best loss, and steps that are not finite."""

import itertools
import math

import pytest
import torch

import train
from tests.helpers import runs
from trainer.data import EVAL_SEED, TokenData
from trainer.settings import from_arguments
from trainer.step import TrainingStep
from trainer.weights import build_model


@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_a_run_takes_exactly_max_iters_steps_and_saves_the_last(count, start, monkeypatch, capsys, out):
    drawn, original = [], TokenData.batch

    def batch(self, *place):
        drawn.append(place[:4])
        return original(self, *place)

    monkeypatch.setattr(TokenData, "batch", batch)
    assert start(out, **runs.FULL, max_iters=count) == 0
    assert [b for b in drawn if b[0] == "train"] == [("train", 1337, step, i) for step in range(count) for i in (0, 1)]
    evaluations = sum(step % 3 == 0 or step == count for step in range(count + 1))
    assert [b for b in drawn if b[0] == "val"] == [("val", EVAL_SEED, 0, i) for i in (0, 1)] * evaluations
    assert runs.steps(out) == list(range(count + 1))
    if count == 0:
        loss = runs.metrics(out)[0]["val/loss"]
        assert f"done at step 0, validation loss at step 0: {loss:.4f} nats per token\n" in capsys.readouterr().out
        assert not (out / "ckpt.pt").exists()
    else:
        saved = runs.checkpoint(out)
        assert saved["iter_num"] == saved["chrono"]["coherence"]["step"] == count
        assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {count}


def test_the_learning_rate_warms_up_decays_as_a_cosine_and_reaches_the_optimizer(start, out):
    s = from_arguments("--learning_rate=1 --min_lr=0.2 --warmup_iters=3 --lr_decay_iters=11".split())
    rates = [train.learning_rate(s, step) for step in range(13)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == pytest.approx([*(0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(9)), 0.2])
    s.decay_lr = False
    assert train.learning_rate(s, 0) == 1
    start(out, max_iters=3, lr_decay_iters=7)
    assert [line["lr"] for line in runs.metrics(out)[1:]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert runs.checkpoint(out)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-2)


def test_the_validation_loss_is_the_mean_over_the_fixed_batches_without_dropout(full_run, dataset):
    model, data = build_model(runs.checkpoint(full_run), "the run").eval(), TokenData(dataset, 16)
    with torch.no_grad():
        losses = [model(*data.batch("val", EVAL_SEED, 0, i, 4))[1].item() for i in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert runs.val_losses(full_run)[-1] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_the_best_loss_is_that_of_a_saved_step_and_survives_resume_and_nan(start, capsys, out):
    start(out, learning_rate=1.0, min_lr=1.0)  # worse than the untrained model
    initial, *losses = runs.val_losses(out)
    best = min(losses)
    assert initial < best and f"best validation loss {best:.4f}" in capsys.readouterr().out
    for changes in ({}, dict(learning_rate=1e30, min_lr=1e30, grad_clip=0, eval_interval=1, max_iters=9)):
        assert start(out, **changes, init_from="resume") == 0
        assert {runs.checkpoint(out, name)["best_val_loss"] for name in ("ckpt.pt", "ckpt_best.pt")} == {best}
    assert None in runs.val_losses(out)[-3:]


RARE = dict(eval_interval=100, log_interval=100, decay_lr=False)


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): in these steps, counted from 1, the loss and all gradients are NaN."""

    def plant(bad_steps):
        original, count = TrainingStep._backward, itertools.count(1)

        def backward(self, batches, logged):
            trace = original(self, batches, logged)
            if next(count) in bad_steps:
                for value in (trace.cross_entropy, *(p.grad for p in self.model.parameters())):
                    value *= torch.nan
            return trace

        monkeypatch.setattr(TrainingStep, "_backward", backward)

    return plant


def test_skipped_steps_are_counted_per_log_line_and_over_a_resume(keys, resume, poison, capsys, out):
    poison({2, 3, 5})
    assert train.main(keys(out, **RARE | dict(log_interval=2, max_iters=4))) == 0
    assert resume(out, log_interval=1, max_iters=7) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if ": skipped" in line]
    expected = [(2, 2, 1), (4, 3, 2), (5, 5, 3)]
    line = "step {}: skipped 1 step: the loss was not finite in step {} ({} in all)"
    assert printed == [line.format(*numbers) for numbers in expected]
    assert [line.get("train/skipped") for line in runs.metrics(out)[1:]] == [1, 2, 3, 3, 3]
    assert runs.checkpoint(out)["guard"]["in_a_row"] == 0


def test_skipped_steps_change_no_state_and_ten_in_a_row_end_the_run(keys, resume, tmp_path, poison, capsys, out):
    good, options = tmp_path / "good", RARE | dict(log_interval=4)
    assert train.main(keys(good, **options, max_iters=2)) == 0
    poison(range(3, 13))
    assert train.main(keys(out, **options, max_iters=40)) == 1
    printed = capsys.readouterr().out
    assert "Try a lower learning_rate" in printed and "stopped at step 12" in printed
    moved = runs.differing_state(out, good, without=("guard", "lines", "best_val_loss"))
    assert moved == {"/iter_num", "/random/0/cpu", "/chrono/coherence/step"}
    assert resume(out, **options, max_iters=16) == 0  # the cause is gone
    assert runs.metrics(out)[-1]["train/skipped"] == 10
