"""Train a GPT with mixture-of-experts layers and, if asked to, the loop coherence -> beta -> routing around them.

python train.py config/vertical_slice.py
python train.py config/vertical_slice.py --seed=2 --out_dir=out/seed2
python train.py config/vertical_slice.py --init_from=resume
python train.py --help
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from chronomoe import ChronoConfig, ChronoLoop
from chronomoe.bridge import bias_needed, reach
from model import GPT, GPTConfig
from trainer import checkpoint as checkpoints
from trainer import settings as setting
from trainer.data import EVAL_SEED, SPLITS, TokenData, open_dataset
from trainer.errors import UserError, run
from trainer.runlog import RunLog, surroundings
from trainer.settings import Settings
from trainer.signals import caught_signals

# Of a checkpoint's model_args what fixes its weights and its routing; the rest comes from the settings.
KEPT_ON_RESUME = (
    *("n_layer", "n_head", "n_embd", "block_size", "bias", "n_exp", "stride", "use_noisy_top_k"),
    *("top_k", "train_capacity", "eval_capacity", "min_capacity"),
)


def main(arguments: list[str]) -> int:
    """Train as the arguments say. Returns the exit status: 0, or 128 + its number after a signal."""
    if "--help" in arguments or "-h" in arguments:
        print(setting.help_text())
        return 0
    settings = setting.from_arguments(arguments)
    with caught_signals() as caught:
        train(settings, caught)
    return 128 + caught[0] if caught else 0


def train(s: Settings, caught: list[int]) -> None:
    """Run the training that the settings describe, until its end or until a signal is in `caught`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train.py runs on one process: start it with python, not with torchrun")
    device = pick_device(s)
    autocast = pick_precision(s, device)
    saved = checkpoints.load(Path(s.out_dir), device) if s.init_from == "resume" else None
    notes = []
    if saved is not None:
        s, notes = settings_on_resume(s, saved)
    data = open_dataset(s.dataset, s.block_size)
    model, optimizer, loop = build(s, data, device, saved)
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == "float16")
    step, best_val_loss, wandb_id = 0, math.inf, None
    torch.manual_seed(s.seed)  # dropout and router noise draw from the global generator
    if saved is not None:
        step, best_val_loss = saved["iter_num"], float(saved["best_val_loss"])
        wandb_id = saved.get("wandb_id")
        if "random" in saved:
            checkpoints.restore_random_state(saved["random"], device)
        if saved.get("scaler"):  # empty where the saved run needed none
            scaler.load_state_dict(saved["scaler"])
        loop.began_at = step - loop.coherence.step.item()
    fresh, saved = saved is None, None  # free its memory
    forward = model
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads their token counts
        forward = torch.compile(model)

    def batch(split: str, seed: int, at_step: int, micro: int):
        x, y = data.batch(split, seed, at_step, micro, s.batch_size)
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    @torch.no_grad()
    def evaluate() -> float:
        """Mean cross-entropy over the fixed validation batches, nats per token."""
        model.eval()
        total = torch.zeros((), device=device)
        for i in range(s.eval_iters):
            with autocast():
                total += forward(*batch("val", EVAL_SEED, 0, i))[1]
        model.train()
        return total.item() / s.eval_iters

    if s.eval_only:
        print(f"validation loss at step {step}: {evaluate():.4f} nats per token, over {s.eval_iters} batches")
        return
    log = RunLog(s, s.flat() | surroundings(data.meta), start=step, wandb_id=wandb_id)
    for line in introduction(s, model, data, device) + notes:
        log.say(line)

    def save(step: int) -> None:
        log.decide(loop.report())  # what is saved as reported is in the file
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "chrono": loop.state_dict(),
            "scaler": scaler.state_dict(),
            "random": checkpoints.random_state(device),
            "model_args": model_args(model.config),
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": s.flat(),
            "wandb_id": log.wandb_id,
        }
        checkpoints.save(Path(s.out_dir), state)

    def check(step: int) -> dict[str, float]:
        """Evaluate, and save if it is time to."""
        nonlocal best_val_loss
        val_loss = evaluate()
        better = val_loss < best_val_loss
        if better:  # not min(): a loss may be no number
            best_val_loss = val_loss
        if step > 0 and (better or s.always_save_checkpoint):
            save(step)
        return {"val/loss": val_loss}

    model.train()
    if fresh:
        log.write({"step": step} | check(step))
    timer, timed_from = time.perf_counter(), step
    # `step` counts optimizer steps done, so a line of step 1 tells of the first.
    while step < s.max_iters and not caught:
        lr = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = None
        for micro in range(s.gradient_accumulation_steps):
            x, y = batch("train", s.seed, step, micro)
            with autocast():
                _, loss, trace = forward(x, y, return_trace=True)
            scaler.scale(loss / s.gradient_accumulation_steps).backward()
            total = trace if total is None else total + trace
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        # A gradient that is not finite: the optimizer skips the step and the loop its observation, on the device.
        optimizer.found_inf = found_inf = (~grad_norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step(total, found_inf)
        step += 1
        log.tick()

        values: dict[str, float | None] = {}
        if step % s.log_interval == 0 or step == s.max_iters:
            ms = (time.perf_counter() - timer) * 1000 / (step - timed_from)
            values |= step_values(s, total, lr, grad_norm, ms, step) | loop.read()
            log.decide(loop.report())
        if step % s.eval_interval == 0 or step == s.max_iters:
            values |= check(step)
        if values:
            log.write({"step": step} | values)
            timer, timed_from = time.perf_counter(), step

    if caught and step < s.max_iters:
        save(step)
    log.close()
    for line in farewell(s, step, best_val_loss, stopped=step < s.max_iters):
        print(line)


def settings_on_resume(s: Settings, saved: dict) -> tuple[Settings, list[str]]:
    """The settings to go on with, the model's shape from the checkpoint, and a line on each that differs."""
    asked = s.flat()
    kept = {key: value for key, value in saved["model_args"].items() if key in KEPT_ON_RESUME and value != asked[key]}
    before = saved.get("config", {}) | kept
    s = setting.from_values(asked | kept)
    notes = [f"resume: {key}={kept[key]} as in the checkpoint, not {asked[key]}" for key in kept]
    for key, value in s.flat().items():
        if key in before and before[key] != value and key not in ("init_from", "out_dir"):
            notes.append(f"resume: {key}={value}, before {before[key]}")
    return s, notes


def build(s: Settings, data: TokenData, device: torch.device, saved: dict | None) -> tuple:
    """(model, optimizer, loop) on `device`, new from the seed or as saved. Raises UserError if they do not fit."""
    vocab_size = saved["model_args"]["vocab_size"] if saved else data.vocab_size
    if vocab_size < data.vocab_size:
        raise UserError(
            f"the checkpoint knows {vocab_size} tokens, the dataset {s.dataset} has {data.vocab_size}: "
            "resume with the dataset that it was trained on"
        )
    model = GPT(GPTConfig(**s.model_args(vocab_size)), torch.Generator().manual_seed(s.seed)).to(device)
    loop = ChronoLoop(model.router_state, model.config.moe_blocks, seed=s.seed)
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), device.type)
    if saved is None:
        return model, optimizer, loop
    try:
        # nanoMoE saves compiled models under a prefix, and knows no router_state
        weights = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
        model.load_state_dict(model.router_state.state_dict(prefix="router_state.") | weights)
        # the fused step is the one that can be skipped on the device
        fused = [group | {"fused": True, "foreach": None} for group in saved["optimizer"]["param_groups"]]
        optimizer.load_state_dict(saved["optimizer"] | {"param_groups": fused})
        if "chrono" in saved:
            loop.load_state_dict(saved["chrono"])
    except (RuntimeError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{Path(s.out_dir) / checkpoints.NAME} does not fit its own settings: {reason}") from None
    return model, optimizer, loop


def model_args(config: GPTConfig) -> dict:
    """GPTConfig as plain values; the loop's settings are in the checkpoint's config."""
    return {name: value for name, value in vars(config).items() if name != "chrono"}


def pick_device(s: Settings) -> torch.device:
    """Resolve s.device, 'auto' for CUDA if there is one. Raises UserError if it is not there."""
    if s.device == "auto":
        s.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(s.device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device={s.device!r} cannot train here; use --device=cpu, or auto for what there is") from None
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


def introduction(s: Settings, model: GPT, data: TokenData, device: torch.device) -> list[str]:
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
        f"{torch.get_num_threads()} threads; writes to {s.out_dir}",
        f"loop: {steps_on}" + (f"; beta follows {s.chrono.signal}" if s.chrono.beta else ""),
    ]
    if s.chrono.router:
        lines.append(reach_line(s.chrono))
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
    needed = bias_needed(chrono.bridge_signal, chrono.bridge_threshold)
    name, threshold = chrono.bridge_signal, chrono.bridge_threshold
    if not math.isfinite(needed):
        return f"{line}; no bias reaches the bridge's threshold, {name} {threshold:g}"
    if chrono.k_max == 0:
        return f"{line}; the bridge cannot act"
    return (
        f"{line}; the bridge acts above {name} {threshold:g}, which takes a logit_std over {needed / chrono.k_max:.2f}"
    )


def farewell(s: Settings, step: int, best_val_loss: float, stopped: bool) -> list[str]:
    """Where the run is and what to do with it."""
    out = Path(s.out_dir)
    lines = [
        f"{'stopped' if stopped else 'done'} at step {step}, best validation loss {best_val_loss:.4f} nats per token"
    ]
    names = ["config.json", "metrics.jsonl", "decisions.jsonl", checkpoints.NAME]
    lines.append(f"the run is in {out}: {', '.join(name for name in names if (out / name).exists())}")
    if stopped:
        lines.append("to go on: repeat the command with --init_from=resume")
    return lines


if __name__ == "__main__":
    run(main)
