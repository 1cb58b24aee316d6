"""The lines that a run prints before its first and after its last step."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import torch

from chronomoe import ChronoConfig
from chronomoe.bridge import bias_needed, reach
from chronomoe.signals import SIGNALS
from model import GPT
from trainer import checkpoint
from trainer.checkpointer import Checkpointer
from trainer.data import SPLITS, Texts
from trainer.distributed import World
from trainer.flops import peak
from trainer.guard import Skipped
from trainer.progress import Progress
from trainer.settings import Settings
from trainer.worth import WorthMeter


def first_lines(s: Settings, model: GPT, texts: Texts, device: torch.device, world: World) -> list[str]:
    """What the run does, and warnings about its settings."""
    parameters = model.get_num_params(non_embedding=False)
    c = model.config
    experts = f"{c.n_exp} experts in blocks {c.moe_blocks}, {c.top_k} per token" if c.n_exp > 1 else "dense"
    steps_on = ", ".join(s.chrono.steps_on()) or "all steps off"
    lines = []
    for name, data in texts.items():
        train_tokens, val_tokens = (len(data.tokens[split]) for split in SPLITS)
        size = f"{data.folder.name}, {train_tokens:,} train and {val_tokens:,} val tokens, vocabulary {c.vocab_size}"
        begins = [str(step) for dataset, step in s.schedule if dataset == name]
        lines.append(f"data: {size}" + (f"; from step {', '.join(begins)}" if s.data_schedule else ""))
    lines += [
        f"model: {parameters:,} parameters, {model.num_active_params():,} active per token; {experts}",
        f"run: {s.max_iters:,} steps of {s.tokens_per_step:,} tokens on {device} in {s.dtype}, "
        + (f"{world.world_size} ranks, " if world.world_size > 1 else "")
        + f"{torch.get_num_threads()} threads; writes to {s.out_dir}",
        f"loop: {steps_on}" + (f"; beta follows {SIGNALS[s.chrono.signal].what}" if s.chrono.beta else ""),
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
    """How much beta can disagree with the router at these settings, and what the bridge needs to act."""
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
        f"{line}; the bridge acts above {name} {threshold:g}, which needs a logit_std over {needed / chrono.k_max:.2f}"
    )


def last_lines(
    s: Settings, progress: Progress, checkpointer: Checkpointer, failure: Skipped | None, worth: WorthMeter | None
) -> list[str]:
    """How the run ended, where its files are, and how to continue it."""
    out, step = Path(s.out_dir), progress.step
    is_stopped = step < s.max_iters
    lines = []
    if failure is not None:
        lines.append(
            f"ended: in the last {failure.in_a_row} steps loss or gradient was not finite, and the weights did not "
            "change. Try a lower learning_rate, a grad_clip, another dtype than float16, or an older checkpoint"
        )
    ended = f"{'stopped' if is_stopped else 'done'} at step {step}"
    if math.isfinite(progress.best_val_loss):
        ended += f", best validation loss {progress.best_val_loss:.4f} nats per token"
    elif progress.last_evaluation is not None:
        last_step, loss = progress.last_evaluation
        ended += f", validation loss at step {last_step}: {loss:.4f} nats per token"
    lines.append(ended)
    if checkpointer.failure is not None:
        saved = checkpointer.saved_step
        newest = "there is no checkpoint" if saved is None else f"the newest checkpoint is of step {saved}"
        lines.append(f"the state of step {step} is not saved ({checkpointer.failure}); {newest}")
    if worth is not None:
        lines.append(
            f"signal worth: {worth.count} measurements took {worth.seconds:.1f} s, which is not in time/step_ms"
        )
    names = ["config.json", "metrics.jsonl", "decisions.jsonl", checkpoint.NAME, checkpoint.BEST]
    lines.append(f"the run is in {out}: {', '.join(name for name in names if (out / name).exists())}")
    if is_stopped and checkpoint.exists(out):
        lines.append("to continue: repeat the command with --init_from=resume")
    if not is_stopped and s.n_exp > 1 and checkpointer.failure is None:
        lines.append(f"to measure what its experts are worth: python audit.py {shlex.quote(s.out_dir)}")
    return lines
