"""TrainingStep against the same step in torch's own functions, and the guard against plain Python."""

import copy

import pytest
import torch

from chronomoe import MoETrace
from tests.helpers.models import adamw, build, chrono, state_of, tokens, trace_of, training_step
from tests.helpers.runs import differing, leaves
from trainer.guard import NonFiniteGuard, Skipped


def micro_batches(step):
    return [tokens(2 * step + i, batch=4) for i in range(2)]


def everything(model, loop, optimizer):
    """Copies of weights, the loop's state, and the optimizer's averages."""
    return state_of(model, loop) | copy.deepcopy(leaves(optimizer.state_dict()["state"]))


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
        changed = number == 1 or differing(before, everything(model, loop, optimizer))
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
