"""Train a GPT with mixture-of-experts layers and, if asked to, the loop coherence -> beta -> routing around them.

python train.py config/vertical_slice.py
python train.py config/vertical_slice.py --seed=2 --out_dir=out/seed2
python train.py config/vertical_slice.py --init_from=resume
python train.py --help
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from chronomoe import ChronoConfig, ChronoLoop
from chronomoe.bridge import bias_needed, reach
from model import GPT, GPTConfig
from trainer import checkpoint as checkpoints
from trainer import resume, weights
from trainer import settings as setting
from trainer.data import EVAL_SEED, SPLITS, Prefetcher, TokenData, open_dataset
from trainer.environment import surroundings
from trainer.errors import UserError, first_line, run
from trainer.flops import flops_per_token, peak
from trainer.guard import NonFiniteGuard, Skipped
from trainer.lock import held
from trainer.ranks import Ranks, environment, job, joined
from trainer.runlog import NoLog, RunLog, record_of
from trainer.settings import Settings
from trainer.signals import caught_signals
from trainer.streams import DROPOUT_AND_NOISE, PERMUTATION, stream_seed
from trainer.timer import StepTimer

MOST_SKIPPED = 10  # steps skipped in a row that end a run


def main(arguments: list[str]) -> int:
    """Train as the arguments say. Returns the exit status: 0, 1 if the run failed, 128 + its number after a signal."""
    if "--help" in arguments or "-h" in arguments:
        print(setting.help_text())
        return 0
    rank, count, _ = environment()
    try:
        given = setting.given(arguments)
    except UserError:
        if rank > 0:
            return 2  # rank 0 says it
        raise
    with caught_signals(count) as caught, contextlib.ExitStack() as closing:
        try:
            device = device_name(given.get("device", Settings().device))
            ranks = closing.enter_context(joined(device, given.get("backend", Settings().backend)))
            failed = train(given, ranks, caught, closing)
        except UserError as e:
            raise UserError(f"rank {rank}: {e}" if rank > 0 else str(e)) from None
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"{first_line(e).split(' Tried')[0]} Lower batch_size and raise gradient_accumulation_steps by as much"
            ) from None
        except RuntimeError as e:
            if not (isinstance(e, torch.distributed.DistError) or "gloo" in str(e)):
                raise
            why = "waited in vain for" if "timed out" in str(e).lower() else "lost"
            raise UserError(f"rank {rank} {why} the other ranks: the one that ended first says why") from None
    return 128 + caught[0] if caught else int(failed)


def train(given: dict[str, Any], ranks: Ranks, caught: list[int], closing: contextlib.ExitStack) -> bool:
    """Train as the keys say, until the end or until a signal is in `caught`. Returns whether the run failed.

    Every rank runs this; the first one writes and logs.
    """
    again = ranks.first and resume.is_started_again(given)
    if ranks.first:
        out_dir = resume.folder(given, again)
        if not given.get("eval_only"):
            closing.enter_context(held(out_dir))
    (again,) = ranks.agree(again)  # none goes on before rank 0 has got so far
    start = resume.begin(given, bool(again))
    s, saved, out_dir = start.settings, start.saved, Path(start.settings.out_dir)
    device = pick_device(s.device, ranks)
    s.device = device.type if ranks.count > 1 else str(device)
    autocast = pick_precision(s, device)
    if s.gradient_accumulation_steps % ranks.count != 0:
        raise UserError(
            f"gradient_accumulation_steps={s.gradient_accumulation_steps} micro-batches cannot be shared equally by "
            f"{ranks.count} ranks"
        )
    if not ranks.first:
        ranks.wait()  # rank 0 may have to prepare the data
    data = open_dataset(s.dataset, s.block_size)
    fit_vocabulary(s, data, start)
    files = data.fingerprint(resume.known_files(start)) if ranks.first else {}
    resume.check_data(start, files)
    if ranks.first:
        ranks.wait()
    model, optimizer, loop = build(s, data, device)
    if start.weights:
        start.notes += weights.put(start.weights, start.weights_from, model)
        start.weights = None
    guard = NonFiniteGuard(model)
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == "float16")
    # dropout and router noise draw from the global generator
    torch.manual_seed(stream_seed(s.seed, DROPOUT_AND_NOISE, ranks.rank))
    step, best_val_loss, unfinished = 0, math.inf, {"step": 0}
    last_evaluation = None
    origin = {"weights_from": start.weights_from, "weights_sha256": start.weights_sha256}
    record = record_of(saved) if saved else None
    if saved:
        resume.restore(saved, out_dir / checkpoints.NAME, model, optimizer, loop, guard, scaler)
        start.notes += resume.restore_random_state(saved, device, ranks, s.seed)
        step, best_val_loss, unfinished = saved["iter_num"], resume.best_loss(saved, out_dir), saved.get("unfinished")
        loop.began_at = step - loop.coherence.step.item()
    resumed, saved, start.saved = saved is not None, None, None  # free its memory
    forward = model
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads their token counts
        forward = torch.compile(model)
        loop.compile()
    averaged = ranks.wrap(forward, device)

    batches = Prefetcher(data, s.batch_size, device)

    @torch.no_grad()
    def evaluate() -> float | None:
        """Mean cross-entropy over the fixed validation batches, nats per token; None if a signal cut it short."""
        nonlocal stop
        model.eval()
        losses = torch.zeros(s.eval_iters, device=device)  # each rank fills in its own: the sum is that of one process
        for i in range(0, s.eval_iters, ranks.count):
            (stop,) = ranks.agree(*caught[:1] or [0])
            if stop:
                break
            if i + ranks.rank < s.eval_iters:
                x, y = batches.batch("val", EVAL_SEED, 0, i + ranks.rank)
                with autocast():
                    losses[i + ranks.rank] = forward(x, y, return_logits=False)[1]
        model.train()
        return None if stop else sum(ranks.sum(losses).tolist()) / s.eval_iters

    stop = 0  # the number of a signal that any rank got
    if s.eval_only:
        for note in start.notes if ranks.first else []:
            print(note)
        loss = evaluate()
        if loss is not None and ranks.first:
            what = f"at step {step}" if resumed or origin["weights_from"] is None else f"of {origin['weights_from']}"
            print(f"validation loss {what}: {loss:.4f} nats per token, over {s.eval_iters} batches")
        caught += [stop] if stop and not caught else []
        return False

    log, keeper = NoLog(), None
    if ranks.first:
        checkpoints.set_aside(start.damaged)
        around = surroundings() | {"ranks": ranks.count}
        data_sha256 = {name: f["sha256"] for name, f in files.items()}
        resolved = s.flat() | around | {"data_sha256": data_sha256, "vocab_size": data.vocab_size} | origin
        this_start = {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "changed": start.changed,
            "job": job(),
        }
        log = RunLog(s, resolved, this_start | around | {"host": socket.gethostname()}, step, record)
        closing.callback(log.close, caught)
        for line in introduction(s, model, data, device, ranks) + start.notes:
            log.say(line)
        keeper = checkpoints.Keeper(out_dir, log.say, log.sync, s.checkpoint_interval, s.checkpoint_minutes)
        closing.callback(keeper.wait)
        keeper.saved_step = step if resumed and not start.damaged else None

    def save(best: bool = False) -> None:
        random = ranks.gather(checkpoints.random_state(device))
        if keeper is None:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "chrono": loop.state_dict(),
            "guard": guard.state_dict(),
            "scaler": scaler.state_dict(),
            "random": random,
            "model_args": model_args(model.config),
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "unfinished": unfinished,
            "config": s.flat(),
            "data": files,
            **origin,
            **log.state(),
        }
        keeper.save(state, best)

    def check() -> None:
        """Complete the unfinished line with an evaluation, write it, and save if it is time to."""
        nonlocal best_val_loss, last_evaluation, unfinished
        val_loss = evaluate()
        if val_loss is None:
            return
        last_evaluation = step, val_loss
        # not min(): a loss may be no number. Step 0 is not saved, and counts for no best loss.
        better = step > 0 and val_loss < best_val_loss
        if better:
            best_val_loss = val_loss
        line, unfinished = unfinished | {"val/loss": val_loss}, None
        log.write(line)
        if step > 0 and (better or s.always_save_checkpoint):
            save(best=better)

    highest = peak(device, s.dtype)
    most_tokens_per_s = ranks.count * highest / flops_per_token(model) if highest else None
    failure = None
    model.train()
    if unfinished:
        check()
    timer = StepTimer(device)
    # `step` counts optimizer steps done, so a line of step 1 tells of the first.
    while step < s.max_iters and not stop and failure is None:
        lr = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logs = (step + 1) % s.log_interval == 0 or step + 1 == s.max_iters
        observe = True if logs or s.compile else "state"  # compiled, two kinds of step cost more than they save
        total = None
        micros = range(ranks.rank, s.gradient_accumulation_steps, ranks.count)  # of the step's, this rank's
        for micro in micros:
            next_step, next_micro = (step, micro + ranks.count) if micro != micros[-1] else (step + 1, ranks.rank)
            x, y = batches.batch("train", s.seed, step, micro, following=("train", s.seed, next_step, next_micro))
            with nullcontext() if ranks.count == 1 or micro == micros[-1] else averaged.no_sync():
                with autocast():
                    _, loss, trace = averaged(x, y, return_trace=observe, return_logits=False)
                scaler.scale(loss / len(micros)).backward()
            total = trace if total is None else total + trace
        total = total.summed_over_ranks()
        scaler.unscale_(optimizer)
        norms = guard.norms()
        grad_norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), s.grad_clip or math.inf, grad_norm)
        # Where loss or gradient is not finite the optimizer skips the step and the loop its observation, on the device.
        optimizer.found_inf = found_inf = guard.check(total, norms, step + 1)
        optimizer.step()  # not scaler.step(), which would put its own found_inf, of the gradients alone, in the place
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step(total, found_inf)
        step += 1
        timer.steps += 1
        log.tick()

        line: dict[str, float | None] = {"step": step}
        if logs:
            ms = timer.ms_per_step()
            line |= step_values(s, total, lr, grad_norm, ms, step) | {"train/skipped": guard.total.item()} | loop.read()
            if most_tokens_per_s is not None:
                line["time/mfu"] = line["time/tokens_per_s"] / most_tokens_per_s
            log.decide(loop.report())
            skipped = guard.report()
            if skipped is not None:
                log.say(f"step {step}: {skipped.line()}")
                if skipped.in_a_row >= MOST_SKIPPED:
                    failure = skipped
        if step % s.eval_interval == 0 or step == s.max_iters:
            unfinished = line
            with timer.paused():
                check()
        elif logs:
            log.write(line)
        if logs:
            timer.restart()
        number, due = ranks.agree(*caught[:1] or [0], keeper is not None and keeper.due(step))
        stop = stop or number
        if due and not stop:  # else it is saved below
            with timer.paused():
                save()

    caught += [stop] if stop and not caught else []
    if keeper is not None:
        keeper.wait()
    (unsaved,) = ranks.agree(keeper is not None and (keeper.saved_step != step or bool(unfinished)))
    if unsaved and (stop or step > 0 or unfinished):
        save()
    if keeper is None:
        return failure is not None
    keeper.wait()
    log.close(caught)
    for text in farewell(s, step, best_val_loss, last_evaluation, keeper, failure):
        log.say(text)
    return failure is not None or keeper.failure is not None


def fit_vocabulary(s: Settings, data: TokenData, start: resume.Start) -> None:
    """Give data the vocabulary of the weights, if there are any. Raises UserError if it is smaller than the data's."""
    if start.saved is None and start.weights is None:
        return
    if not isinstance(start.vocab_size, int):
        raise UserError(f"the checkpoint that init_from={s.init_from!r} names does not say its vocab_size")
    if start.vocab_size < data.meta.get("vocab_size", 0):
        raise UserError(
            f"the checkpoint knows {start.vocab_size} tokens, the dataset {s.dataset} has {data.vocab_size}: "
            "take the dataset that it was trained on"
        )
    data.vocab_size = start.vocab_size


def build(s: Settings, data: TokenData, device: torch.device) -> tuple:
    """(model, optimizer, loop) on `device`, new from the seed."""
    model = GPT(GPTConfig(**s.model_args(data.vocab_size)), torch.Generator().manual_seed(s.seed)).to(device)
    loop = ChronoLoop(model.router_state, model.config.moe_blocks, seed=stream_seed(s.seed, PERMUTATION))
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), device.type)
    return model, optimizer, loop


def model_args(config: GPTConfig) -> dict:
    """GPTConfig as plain values; the loop's settings are in the checkpoint's config."""
    return {name: value for name, value in vars(config).items() if name != "chrono"}


def device_name(name: str) -> str:
    """The name, 'auto' resolved: CUDA if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def pick_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """The device by its name, 'auto' for CUDA if there is one; a rank's own. Raises UserError if it is not there."""
    name = device_name(name)
    if name == "cuda" and ranks is not None and ranks.count > 1:
        name = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device={name!r} cannot train here; use --device=cpu, or auto for what there is") from None
    return device


def pick_precision(s: Settings, device: torch.device):
    """Resolve s.dtype and return the autocast context to run forward in."""
    if s.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        s.dtype = "bfloat16" if bf16 else "float16" if device.type == "cuda" else "float32"
    if device.type != "cuda":
        if s.dtype != "float32":
            raise UserError(f"dtype={s.dtype!r} needs CUDA; on {device} use --dtype=float32")
        return nullcontext
    torch.set_float32_matmul_precision("high")  # TF32, as nanoMoE
    if s.dtype == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, s.dtype))


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters."""
    if not s.decay_lr:
        return s.learning_rate
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    done = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (s.learning_rate - s.min_lr)


def tokens_per_step(s: Settings) -> int:
    return s.gradient_accumulation_steps * s.batch_size * s.block_size


def step_values(s: Settings, total, lr: float, grad_norm: torch.Tensor, ms: float, step: int) -> dict[str, float]:
    """The numbers of a logged step that are not the loop's. Waits for the device."""
    tokens = tokens_per_step(s)
    losses = torch.stack([total.cross_entropy, total.aux_loss, total.router_z_loss]) / total.batches
    cross_entropy, aux_loss, router_z_loss, norm = [*losses.tolist(), grad_norm.item()]
    return {
        "tokens": step * tokens,
        "time/step_ms": ms,
        "time/tokens_per_s": tokens * 1000 / ms,
        "lr": lr,
        "grad_norm": norm,
        "train/loss": cross_entropy,
        "train/aux_loss": aux_loss,
        "train/router_z_loss": router_z_loss,
    }


def introduction(s: Settings, model: GPT, data: TokenData, device: torch.device, ranks: Ranks) -> list[str]:
    """What a person should know before the first step."""
    train_tokens, val_tokens = (len(data.tokens[split]) for split in SPLITS)
    step_tokens = tokens_per_step(s)
    parameters = model.get_num_params(non_embedding=False)
    c = model.config
    experts = f"{c.n_exp} experts in blocks {c.moe_blocks}, {c.top_k} a token" if c.n_exp > 1 else "dense"
    steps_on = ", ".join(s.chrono.steps_on()) or "all steps off"
    lines = [
        f"data: {data.folder.name}, {train_tokens:,} train and {val_tokens:,} val tokens, vocabulary {c.vocab_size}",
        f"model: {parameters:,} parameters, {model.num_active_params():,} active per token; {experts}",
        f"run: {s.max_iters:,} steps of {step_tokens:,} tokens on {device} in {s.dtype}, "
        + (f"{ranks.count} ranks, " if ranks.count > 1 else "")
        + f"{torch.get_num_threads()} threads; writes to {s.out_dir}",
        f"loop: {steps_on}" + (f"; beta follows {s.chrono.signal}" if s.chrono.beta else ""),
    ]
    if c.n_exp > 1 and c.top_k == 1 and c.norm_topk_prob:
        lines.append(
            "router: with top_k=1 and norm_topk_prob=True every gate is 1 and the cross-entropy does not train the "
            "router; set norm_topk_prob=False"
        )
    if s.chrono.router:
        lines.append(reach_line(s.chrono))
    if device.type == "cuda" and peak(device, s.dtype) is None:
        name = torch.cuda.get_device_name(device)
        lines.append(f"no time/mfu: the peak of {name} in {s.dtype} is not in trainer/flops.py")
    return lines


def reach_line(chrono: ChronoConfig) -> str:
    """How much beta can disagree with the router at these settings, and what the bridge would need to act."""
    largest = reach(chrono.k_max)
    line = (
        f"reach: k_max={chrono.k_max:g} allows at most JS {largest['js']:.3f} and overlap {largest['overlap']:.3f} "
        "at a logit_std of 1"
    )
    if not chrono.bridge:
        return line
    name, threshold = chrono.bridge_signal, chrono.disagreement_threshold
    needed = bias_needed(name, threshold)

    if not math.isfinite(needed):
        return f"{line}; no bias reaches the bridge's threshold, {name} {threshold:g}"
    if chrono.k_max == 0:
        return f"{line}; the bridge cannot act"
    return (
        f"{line}; the bridge acts above {name} {threshold:g}, which takes a logit_std over {needed / chrono.k_max:.2f}"
    )


def farewell(
    s: Settings,
    step: int,
    best: float,
    last: tuple[int, float] | None,
    keeper: checkpoints.Keeper,
    failure: Skipped | None,
) -> list[str]:
    """How the run ended, where it is and what to do with it.

    best: the lowest validation loss from step 1 on; infinite without one. last: (step, loss) of the last evaluation.
    """
    out = Path(s.out_dir)
    stopped = step < s.max_iters
    lines = []
    if failure is not None:
        lines.append(
            f"ended: in the last {failure.in_a_row} steps loss or gradient was not finite, and the weights are those "
            "of before. Try a lower learning_rate, a grad_clip, another dtype than float16, or an older checkpoint"
        )
    ended = f"{'stopped' if stopped else 'done'} at step {step}"
    if math.isfinite(best):
        ended += f", best validation loss {best:.4f} nats per token"
    elif last is not None:
        ended += f", validation loss at step {last[0]}: {last[1]:.4f} nats per token"
    lines.append(ended)
    if keeper.failure is not None:
        newest = "there is no checkpoint" if keeper.saved_step is None else f"the newest is of step {keeper.saved_step}"
        lines.append(f"the state of step {step} is not saved ({keeper.failure}); {newest}")
    names = ["config.json", "metrics.jsonl", "decisions.jsonl", checkpoints.NAME, checkpoints.BEST]
    lines.append(f"the run is in {out}: {', '.join(name for name in names if (out / name).exists())}")
    if stopped and checkpoints.exists(out):
        lines.append("to go on: repeat the command with --init_from=resume")
    return lines


if __name__ == "__main__":
    run(main)
