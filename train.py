"""Train a GPT with mixture-of-experts layers and, if switched on, the loop coherence -> beta -> routing around them.

python train.py config/vertical_slice.py
python train.py config/vertical_slice.py --seed=2 --out_dir=out/seed2
python train.py config/vertical_slice.py --init_from=resume
python train.py --help

The settings are declared in trainer/settings.py, trainer/setup.py builds the run from them, and the loop is here.
"""

from __future__ import annotations

from trainer.errors import run_script  # first, so that Ctrl-C during the other imports is quiet

# isort: split

import torch

from trainer import cli, messages
from trainer import settings as setting
from trainer.flops import flops_per_token, peak
from trainer.guard import Skipped
from trainer.progress import Line
from trainer.schedule import learning_rate
from trainer.setup import Run, open_run
from trainer.step import StepResult
from trainer.timer import StepTimer

MAX_SKIPPED = 10  # consecutive skipped steps that end a run; counted at logged steps


def main(arguments: list[str]) -> int:
    """Train as the arguments say. Returns the exit status: 0, 1 if the run failed, 128 + its number after a signal."""
    if cli.asks_for_help(arguments):
        print(setting.help_text())
        return 0
    with open_run(arguments) as run:
        has_failed = report_validation_loss(run) if run.settings.eval_only else train(run)
        return run.interrupt.exit_status or int(has_failed)


def train(run: Run) -> bool:
    """Train until max_iters, a signal, or MAX_SKIPPED skipped steps in a row. Returns whether the run failed."""
    s, progress, checkpointer, log = run.settings, run.progress, run.checkpointer, run.log
    timer = StepTimer(run.device)
    failure: Skipped | None = None
    run.model.train()
    while True:
        if progress.pending is not None:  # the line of the last step waits for its evaluation
            with timer.paused():
                evaluate_and_save(run)
        save_is_due = run.interrupt.poll(checkpointer.is_due())
        if run.interrupt.stopping or failure is not None or progress.step >= s.max_iters:
            break
        if save_is_due:
            with timer.paused():
                checkpointer.save()
        if run.worth is not None and run.worth.is_due(progress.step):
            with timer.paused():
                run.worth.measure(progress.step)

        lr = learning_rate(s, progress.step)
        next_step = progress.step + 1
        is_logged = next_step % s.log_interval == 0 or next_step == s.max_iters
        # compiled, steps that are logged and steps that are not would be two graphs
        result = run.training_step(run.batches.training(progress.step), next_step, lr, logged=is_logged or s.compile)
        progress.step = next_step
        timer.steps += 1
        log.advance()

        line: Line = {"step": next_step}
        if is_logged:
            line |= step_metrics(run, result, lr, timer.ms_per_step()) | run.loop.read()
            log.decisions(run.loop.report())
            skipped = run.guard.report()
            if skipped is not None:
                log.alert("Skipped steps", f"step {next_step}: {skipped.line()}", next_step)
                failure = skipped if skipped.in_a_row >= MAX_SKIPPED else None
        if next_step % s.eval_interval == 0 or next_step == s.max_iters:
            progress.pending = line
        elif is_logged:
            log.metrics(line)
        if is_logged:
            timer.restart()

    checkpointer.finish(run.interrupt.stopping)
    for text in messages.last_lines(s, progress, checkpointer, failure, run.worth):
        log.info(text)
    log.close(in_haste=run.interrupt.exit_status != 0)
    return failure is not None or checkpointer.failure is not None


def evaluate_and_save(run: Run) -> None:
    """Complete the pending log line with its evaluation, log it, and save. Does nothing if a signal interrupts it.

    The line is the first one, one whose evaluation was interrupted before the run was resumed, or due by eval_interval.
    """
    losses = evaluate(run)
    if losses is None:
        return
    line, is_best = run.progress.evaluated(losses)
    run.log.metrics(line)
    if run.progress.step > 0 and (is_best or run.settings.always_save_checkpoint):
        run.checkpointer.save(is_best)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float] | None:
    """Mean cross-entropy of the fixed validation batches by metric, nats per token; None if a signal interrupted it.

    'val/loss' is of the first dataset; with a data_schedule there is also one of every dataset, as 'val/prose/loss'.
    """
    s, world = run.settings, run.world
    texts = list(run.batches.texts)
    run.model.eval()
    losses = torch.zeros(len(texts), s.eval_iters, device=run.device)  # each rank fills its own entries
    for k, text in enumerate(texts):
        for i in range(0, s.eval_iters, world.world_size):
            run.interrupt.poll()
            if run.interrupt.stopping:
                break
            if i + world.rank < s.eval_iters:
                x, y = run.batches.validation(i + world.rank, text)
                with run.training_step.autocast():
                    losses[k, i + world.rank] = run.forward(x, y, return_logits=False)[1]
    run.model.train()
    if run.interrupt.stopping:
        return None
    means = [sum(of_text) / s.eval_iters for of_text in world.all_reduce_sum(losses).tolist()]
    of_texts = {f"val/{setting.domain(text)}/loss": mean for text, mean in zip(texts, means) if s.data_schedule}
    return {"val/loss": means[0]} | of_texts


def report_validation_loss(run: Run) -> bool:
    """Print the validation loss of a checkpoint, for eval_only. Returns False: it cannot fail."""
    for note in run.start.notes:
        run.log.info(note)
    losses = evaluate(run)
    if losses is not None:
        source = run.start.weights_from
        is_own = source is None or run.start.is_resumed
        what = f"at step {run.progress.step}" if is_own else f"of {source}"
        for name, loss in losses.items():
            of = "" if name == "val/loss" else f" of {name.split('/')[1]}"
            iters = run.settings.eval_iters
            run.log.info(f"validation loss{of} {what}: {loss:.4f} nats per token, over {iters} batches")
    return False


def step_metrics(run: Run, result: StepResult, lr: float, ms: float) -> Line:
    """The metrics of a logged step that are not the loop's. Synchronizes with the device."""
    s, trace = run.settings, result.trace
    losses = torch.stack([trace.cross_entropy, trace.aux_loss, trace.router_z_loss]) / trace.batches
    cross_entropy, aux_loss, router_z_loss = losses.tolist()
    line: Line = {
        "tokens": run.progress.step * s.tokens_per_step,
        "time/step_ms": ms,
        "time/tokens_per_s": s.tokens_per_step * 1000 / ms,
        "lr": lr,
        "grad_norm": result.grad_norm.item(),
        "train/loss": cross_entropy,
        "train/aux_loss": aux_loss,
        "train/router_z_loss": router_z_loss,
        "train/skipped": run.guard.total.item(),
    }
    flops_per_s = peak(run.device, s.dtype)
    if flops_per_s is not None:
        flops = flops_per_token(run.model) * s.tokens_per_step
        line["time/mfu"] = flops / (run.world.world_size * flops_per_s * ms / 1000)
    return line


if __name__ == "__main__":
    run_script(main)
