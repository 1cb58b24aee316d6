"""A training step against torch's own functions; the loop of steps, evaluations, and steps that are not finite."""

import copy
import itertools
import math

import pytest
import torch

import train
from chronomoe import MoETrace
from tests.helpers import runs
from tests.helpers.models import adamw, build, chrono, state_of, tokens, trace_of, training_step
from trainer.data import EVAL_SEED, TokenData
from trainer.guard import NonFiniteGuard, Skipped
from trainer.schedule import learning_rate
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
    rates = [learning_rate(s, step) for step in range(13)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == pytest.approx([*(0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(9)), 0.2])
    s.decay_lr = False
    assert learning_rate(s, 0) == 1
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


def micro_batches(step):
    return [tokens(2 * step + i, batch=4) for i in range(2)]


def everything(model, loop, optimizer):
    """Copies of weights, the loop's state, and the optimizer's averages."""
    return state_of(model, loop) | copy.deepcopy(runs.leaves(optimizer.state_dict()["state"]))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("grad_clip", [0.0, 0.2])
def test_a_step_clips_the_gradient_of_the_mean_loss_and_then_updates(grad_clip, scaled):
    (model, loop), (plain, plain_loop) = (build(chrono(eta=0.1)) for _ in range(2))
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    step = training_step(model, loop, optimizer, scaler=scaler, micro_batches=2, grad_clip=grad_clip)
    for number in range(1, 5):
        result = step(micro_batches(number), number, lr=1e-3 * number)
        (_, loss_1, trace_1), (_, loss_2, trace_2) = (plain(*b, return_trace=True) for b in micro_batches(number))
        ((loss_1 + loss_2) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip or torch.inf)
        for group in plain_optimizer.param_groups:
            group["lr"] = 1e-3 * number
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        sums = {name: value + trace_2.present()[name] for name, value in trace_1.present().items()}
        plain_loop.step(MoETrace(**sums))
        torch.testing.assert_close((result.grad_norm, result.trace.present()), (norm, sums))
        assert norm > 0.2
    ours, theirs = everything(model, loop, optimizer), everything(plain, plain_loop, plain_optimizer)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_whose_loss_or_gradient_is_not_finite_is_skipped_and_the_next_one_is_not(bad):
    model, loop = build(chrono(eta=0.1))
    is_bad = False

    def forward(*args, **options):
        logits, loss, trace = model(*args, **options)
        trace.cross_entropy *= torch.inf if is_bad and bad == "loss" else 1
        return logits, loss, trace

    model.lm_head.weight.register_hook(lambda g: g * torch.inf if is_bad and bad == "gradient" else g)
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    step = training_step(model, loop, optimizer, scaler=scaler, micro_batches=2, forward=forward)
    for number, is_bad in ((1, False), (2, True), (3, False)):
        before = everything(model, loop, optimizer)
        assert step(micro_batches(number), number).found_inf == float(is_bad)
        changed = number == 1 or runs.differing(before, everything(model, loop, optimizer))
        assert (changed == {"/coherence.step"}) == is_bad
        assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="needs 2 micro-batches"):
        step(micro_batches(4)[:1], 4)
    assert scaler.get_scale() == (4 if bad == "gradient" else 8)
    name = "the loss" if bad == "loss" else "the gradient of transformer.wte.weight"
    assert step.guard.report() == Skipped(steps=1, total=1, in_a_row=0, first_step=2, first_bad=name)


def test_the_guard_counts_skipped_steps_and_names_the_first_value_that_is_not_finite():
    model, _ = build(n_exp=1, n_layer=1)
    parameters = dict(model.named_parameters())
    order = ["the loss", "the auxiliary loss", "the router z-loss"]
    order += [f"the gradient of {name}" for name in reversed(parameters)]  # backward's order
    guard, total, in_a_row, reported, first = NonFiniteGuard(model), 0, 0, 0, None
    for step in range(1, 200):
        bad = (torch.rand(len(order)) < 0.08).tolist()
        cross_entropy, aux_loss, router_z_loss, *norms = torch.where(torch.tensor(bad), torch.nan, 1.0)
        losses = dict(cross_entropy=cross_entropy, aux_loss=aux_loss, router_z_loss=router_z_loss)
        found_inf = guard.check(trace_of([[0.0]], [[1]], **losses), torch.stack(norms[::-1]), step)
        skip = bad[0] or any(bad[3:])
        assert found_inf == float(skip) and found_inf.dtype == torch.float32
        total, in_a_row = total + skip, in_a_row + 1 if skip else 0
        if skip and first is None:
            first = step, order[bad.index(True)]
        if step % 3 == 0:
            assert guard.report() == (None if first is None else Skipped(total - reported, total, in_a_row, *first))
            reported, first = total, None
        saved, guard = copy.deepcopy(guard.state_dict()), NonFiniteGuard(model)
        guard.load_state_dict(saved)
    for i, p in enumerate(parameters.values()):
        p.grad = torch.full_like(p, 2.0) if i % 2 else None
    norms = [2.0 * p.numel() ** 0.5 * (i % 2) for i, p in enumerate(parameters.values())]
    torch.testing.assert_close(guard.norms(), torch.tensor(norms))


RARE = dict(eval_interval=100, log_interval=100, decay_lr=False)


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): in these steps, counted from 1, the loss and all gradients are NaN."""

    def plant(bad_steps):
        original, count = TrainingStep._accumulate, itertools.count(1)

        def backward(self, batches, logged):
            trace = original(self, batches, logged)
            if next(count) in bad_steps:
                for value in (trace.cross_entropy, *(p.grad for p in self.model.parameters())):
                    value *= torch.nan
            return trace

        monkeypatch.setattr(TrainingStep, "_accumulate", backward)

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


def test_deterministic_algorithms_are_on_during_a_run_only_and_change_no_bit_on_a_cpu(keys, full_run, out, monkeypatch):
    enabled = []

    def observed(s, step):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return learning_rate(s, step)

    monkeypatch.setattr(train, "learning_rate", observed)
    assert train.main(keys(out, deterministic=True)) == 0
    assert enabled == [True] * runs.STEPS and not torch.are_deterministic_algorithms_enabled()
    runs.assert_same_run(out, full_run)
