"""Set up a training run: ranks, lock, start, device, data, model, checkpoints, log; and close it again."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from chronomoe import ChronoLoop
from model import GPT, GPTConfig
from trainer import checkpoint, messages
from trainer import settings as setting
from trainer.checkpointer import Checkpointer
from trainer.data import BatchLoader, Texts, fingerprint, open_texts
from trainer.device import (
    autocast_context,
    deterministic_algorithms,
    device_name,
    kernel_fusion,
    resolve_dtype,
    select_device,
)
from trainer.distributed import World, one_line_errors, process_group, torchrun_environment, torchrun_id
from trainer.environment import check_torch, describe_environment
from trainer.errors import UserError
from trainer.guard import NonFiniteGuard
from trainer.interrupt import Interrupt, ParentWatch
from trainer.lock import folder_lock
from trainer.memory import check_memory
from trainer.progress import Progress
from trainer.resume import Start, check_data, is_restart, known_files, resolve_start, run_folder
from trainer.runlog import ConsoleLog, NoLog, RunLog, record_of
from trainer.settings import Settings
from trainer.step import TrainingStep
from trainer.streams import DROPOUT_AND_NOISE, PERMUTATION, stream_seed
from trainer.weights import start_from
from trainer.worth import WorthMeter


@dataclass
class Run:
    """Everything that the training loop uses."""

    settings: Settings
    world: World
    interrupt: Interrupt
    device: torch.device
    model: GPT
    forward: nn.Module  # the model, compiled if `compile` is set
    loop: ChronoLoop
    guard: NonFiniteGuard
    training_step: TrainingStep
    batches: BatchLoader
    worth: WorthMeter | None  # only for signal 'worth'
    progress: Progress
    checkpointer: Checkpointer
    log: RunLog | NoLog
    start: Start


@contextlib.contextmanager
def open_run(arguments: list[str]) -> Iterator[Run]:
    """Set up the run that the command line describes, on this rank, and close it on exit.

    Raises UserError for what a user can cause, SystemExit on other ranks if rank 0 reports the error.
    """
    try:
        given = setting.given(arguments)
    except UserError:
        if torchrun_environment()[0] > 0:
            raise SystemExit(2) from None
        raise
    defaults = Settings()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(ParentWatch())
        device = device_name(given.get("device", defaults.device))
        world = stack.enter_context(process_group(device, given.get("backend", defaults.backend)))
        interrupt = watch.interrupt = stack.enter_context(Interrupt(world))
        stack.enter_context(one_line_errors(world))
        yield set_up(given, world, interrupt, stack)


def set_up(given: dict[str, Any], world: World, interrupt: Interrupt, stack: contextlib.ExitStack) -> Run:
    """Build the run of these settings on every rank. The stack releases the lock and closes the log."""
    version_notes = check_torch()
    start = _lock_and_resolve(given, world, stack)
    start.notes += version_notes
    s, saved = start.settings, start.saved
    if s.deterministic:
        stack.enter_context(deterministic_algorithms())
    device = select_device(s.device, world)
    s.device = device.type if world.world_size > 1 else str(device)
    s.dtype = resolve_dtype(s.dtype, device)
    if s.gradient_accumulation_steps % world.world_size != 0:
        raise UserError(
            f"gradient_accumulation_steps={s.gradient_accumulation_steps} micro-batches cannot be shared equally by "
            f"{world.world_size} ranks"
        )
    if s.cuda_graphs and (device.type != "cuda" or world.world_size > 1):
        raise UserError("cuda_graphs=True needs CUDA and one rank")
    texts, files = _open_data(start, world)
    vocab_size = texts[s.dataset].vocab_size
    check_memory(s, vocab_size, device)
    model, optimizer, loop = build(s, vocab_size, device)
    if start.weights is not None and start.weights_from is not None:
        start.notes += start_from(start.weights, start.weights_from, model)
        start.weights = None
    guard = NonFiniteGuard(model)
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == "float16")
    progress = Progress()
    torch.manual_seed(stream_seed(s.seed, DROPOUT_AND_NOISE, world.rank))  # dropout and noise use the global generator
    checkpointer = Checkpointer(
        Path(s.out_dir), model, optimizer, {"chrono": loop, "guard": guard, "scaler": scaler}, progress,
        device=device, world=world, seed=s.seed, interval=s.checkpoint_interval, minutes=s.checkpoint_minutes,
    )  # fmt: skip
    if saved is not None:
        start.notes += checkpointer.restore(saved)
        loop.began_at = progress.step - int(loop.coherence.step.item())
        if "chrono_signal" in start.changed:
            loop.signals.forget()
    record = None if saved is None else record_of(saved)
    saved = start.saved = None  # free the checkpoint's memory
    autocast = autocast_context(s.dtype, device)
    fused, notes = kernel_fusion(s.compile, s.fuse, device, world)
    stack.enter_context(fused)
    start.notes += notes
    if s.compile:
        torch._dynamo.config.capture_scalar_outputs = True  # the loop over experts reads their token counts
    forward = cast(nn.Module, torch.compile(model)) if s.compile else model
    step = TrainingStep(
        model, optimizer, loop, guard, scaler,
        micro_batches=s.gradient_accumulation_steps // world.world_size,
        grad_clip=s.grad_clip, autocast=autocast, forward=world.wrap_ddp(forward, device), world=world,
        cuda_graphs=s.cuda_graphs,
    )  # fmt: skip
    batches = BatchLoader(texts, s.schedule, s.seed, s.batch_size, s.gradient_accumulation_steps, device, world)
    worth = None
    if s.measures_worth:
        worth = WorthMeter(model, loop, batches, s.worth_interval, s.worth_batches, autocast, world)
    run = Run(
        s, world, interrupt, device, model, forward, loop, guard, step, batches, worth, progress, checkpointer,
        NoLog(), start,
    )  # fmt: skip
    if world.is_main and s.eval_only:
        run.log = ConsoleLog()
    elif world.is_main:
        run.log = _open_log(run, texts, files, record, stack)
    return run


def _lock_and_resolve(given: dict[str, Any], world: World, stack: contextlib.ExitStack) -> Start:
    """Lock out_dir on rank 0, then resolve what to start from, on every rank."""
    restart = world.is_main and is_restart(given)
    if world.is_main:
        out_dir = run_folder(given, restart)
        if not given.get("eval_only"):
            stack.enter_context(folder_lock(out_dir))
    (restarted,) = world.all_reduce_max(int(restart))  # also a barrier: rank 0 holds the lock first
    return resolve_start(given, bool(restarted))


def _open_data(start: Start, world: World) -> tuple[Texts, dict[str, dict[str, Any]]]:
    """The run's datasets, and on rank 0 their files' fingerprints. Rank 0 prepares and checks them first."""
    if not world.is_main:
        world.barrier()
    texts = open_texts(start.settings)
    if start.saved is not None or start.weights is not None:
        _use_vocabulary_of_weights(texts, start)
    files = fingerprint(texts, known_files(start)) if world.is_main else {}
    check_data(start, files)
    if world.is_main:
        world.barrier()
    return texts, files


def _use_vocabulary_of_weights(texts: Texts, start: Start) -> None:
    """Set the vocabulary of the datasets to that of the weights. Raises UserError if theirs is smaller."""
    data = texts[start.settings.dataset]
    if not isinstance(start.vocab_size, int):
        raise UserError(f"the checkpoint of init_from={start.settings.init_from!r} does not state its vocab_size")
    if start.vocab_size < data.meta.get("vocab_size", 0):
        raise UserError(
            f"the checkpoint has {start.vocab_size} token ids, the dataset {start.settings.dataset} has "
            f"{data.vocab_size}: use the dataset that it was trained on"
        )
    for data in texts.values():
        data.vocab_size = start.vocab_size


def build(s: Settings, vocab_size: int, device: torch.device) -> tuple[GPT, torch.optim.AdamW, ChronoLoop]:
    """The initial model, optimizer and loop of these settings, on the device."""
    model = GPT(GPTConfig(**s.model_args(vocab_size)), torch.Generator().manual_seed(s.seed)).to(device)
    loop = ChronoLoop(model.router_state, model.config.moe_blocks, seed=stream_seed(s.seed, PERMUTATION))
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), device.type)
    return model, optimizer, loop


def _open_log(
    run: Run, texts: Texts, files: dict[str, Any], record: dict[str, Any] | None, stack: contextlib.ExitStack
) -> RunLog:
    """Start writing to out_dir, on rank 0: the log, config.json, and from now on checkpoints."""
    s, start, checkpointer = run.settings, run.start, run.checkpointer
    checkpoint.remove_partial_files(checkpointer.out_dir)
    checkpoint.set_aside(start.damaged)
    environment = describe_environment(s.protocol) | {"ranks": run.world.world_size}
    data_sha256 = {name: f["sha256"] for name, f in files.items()}
    origin = {"weights_from": start.weights_from, "weights_sha256": start.weights_sha256}
    resolved = s.flat() | environment | {"data_sha256": data_sha256, "vocab_size": texts[s.dataset].vocab_size} | origin
    this_start = {
        "step": run.progress.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "changed": start.changed,
        "job": torchrun_id(),
    }
    this_start |= environment | {"host": socket.gethostname()}
    log = RunLog(s, resolved, this_start, run.progress.step, record)
    stack.callback(lambda: log.close(in_haste=run.interrupt.exit_status != 0))
    stack.callback(checkpointer.wait)
    model_args = {name: value for name, value in vars(run.model.config).items() if name != "chrono"}
    constants = {"model_args": model_args, "config": s.flat(), "data": files, **origin}
    checkpointer.begin(log, constants, is_saved=record is not None and not start.damaged)
    for line in [*messages.first_lines(s, run.model, texts, run.device, run.world), *start.notes]:
        log.info(line)
    return log
