"""Save and restore the state of a run. Saving does not hold up training: a thread writes a copy."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model import GPT
from trainer import checkpoint
from trainer.distributed import World
from trainer.errors import UserError, first_line
from trainer.progress import Progress
from trainer.resume import upgraded
from trainer.runlog import NoLog, RunLog
from trainer.streams import DROPOUT_AND_NOISE, stream_seed

OF_SETTINGS = ("betas", "weight_decay")  # values of the optimizer's groups that a resume takes from the settings


class Stateful(Protocol):
    """What has a state: a model, an optimizer, the loop."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Checkpointer:
    """Saves a registry of named states, the progress and every rank's random state; restores the same.

    All ranks call `restore`, `save`, `save_if_due` and `finish`; rank 0 writes. A save that fails is reported, leaves
    the older checkpoints unchanged, and is tried again at the next save.

    Args:
        out_dir: folder of the run.
        model: saved as 'model'.
        optimizer: saved as 'optimizer'.
        states: what else is saved, by its key in the checkpoint.
        progress: saved under the keys of its own state_dict.
        device: of the model.
        world: the ranks.
        seed: of the run; a rank that has no saved random state draws from it.
        interval: steps between saves; 0: none.
        minutes: time between saves; 0: none.
    """

    def __init__(
        self,
        out_dir: Path,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        states: Mapping[str, Stateful],
        progress: Progress,
        device: torch.device,
        world: World,
        seed: int,
        interval: int = 0,
        minutes: float = 0,
    ):
        self.out_dir = out_dir
        self.model = model
        self.optimizer = optimizer
        self.states: dict[str, Stateful] = {"model": model, "optimizer": optimizer, **states}
        self.progress = progress
        self.device = device
        self.world = world
        self.seed = seed
        self.interval = interval
        self.seconds = minutes * 60 or math.inf
        self.log: RunLog | NoLog = NoLog()
        self.constants: dict[str, Any] = {}
        self.saved_step: int | None = None  # of the newest checkpoint of this run that is written
        self.failure: str | None = None  # why the last save failed
        self._requested_step: int | None = None  # of the last save
        self._thread: threading.Thread | None = None
        self._is_due = False
        self._last_save = time.monotonic()

    def restore(self, saved: dict[str, Any]) -> list[str]:
        """Load a checkpoint into the states. Returns notes for the user. Raises UserError if it does not fit."""
        settings = [{name: group[name] for name in OF_SETTINGS} for group in self.optimizer.param_groups]
        try:
            saved = upgraded(saved, self.model)
            for name, target in self.states.items():
                missing = name not in saved  # in a checkpoint of nanoMoE
                if not missing and (saved[name] or name != "scaler"):  # a disabled scaler has an empty state
                    target.load_state_dict(saved[name])
            for group, values in zip(self.optimizer.param_groups, settings):
                group.update(values)
            self._check_optimizer()
            self.progress.load_state_dict(saved)
            notes = self._restore_random_state(saved)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as e:
            path = self.out_dir / checkpoint.NAME
            raise UserError(f"{path} does not fit its own settings: {' '.join(str(e).split())}") from None
        if not os.path.exists(self.out_dir / checkpoint.BEST):
            self.progress.best_val_loss = math.inf  # older versions counted step 0, which is not saved
        return notes

    def _check_optimizer(self) -> None:
        """Raise ValueError if the optimizer's averages do not fit the parameters, which torch does not check."""
        for p, state in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    raise ValueError(f"the optimizer's {name} is {list(state[name].shape)}, not {list(p.shape)}")

    def _restore_random_state(self, saved: dict[str, Any]) -> list[str]:
        """Restore this rank's random state. Returns warnings."""
        if "random" not in saved:
            return []
        states, world = saved["random"], self.world
        if world.rank < len(states):
            set_random_state(states[world.rank], self.device)
        else:
            torch.manual_seed(stream_seed(self.seed, DROPOUT_AND_NOISE, world.rank, saved["iter_num"]))
        if len(states) == world.world_size:
            return []
        return [f"resume: {world.world_size} ranks, before {len(states)}: dropout and router noise are drawn anew"]

    def begin(self, log: RunLog | NoLog, constants: dict[str, Any], is_saved: bool) -> None:
        """Save from now on. The state of the log and `constants` go into every checkpoint.

        is_saved: the current state is that of the newest checkpoint.
        """
        self.log, self.constants = log, constants
        if is_saved:
            self.saved_step = self._requested_step = self.progress.step

    def is_due(self) -> bool:
        """Whether it is time to save, on rank 0. A save that becomes due during another one waits for it."""
        step = self.progress.step
        if not self.world.is_main or step in (0, self._requested_step):
            return False
        by_step = self.interval > 0 and step % self.interval == 0
        self._is_due |= by_step or time.monotonic() - self._last_save >= self.seconds
        is_writing = self._thread is not None and self._thread.is_alive()
        return self._is_due and not is_writing

    def save(self, is_best: bool = False) -> None:
        """Copy the state and start writing it, after a save that is in progress. is_best: also as ckpt_best.pt."""
        random = self.world.all_gather(random_state(self.device))
        if not self.world.is_main:
            return
        self.wait()
        self._is_due, self._last_save, self._requested_step = False, time.monotonic(), self.progress.step
        state = {name: source.state_dict() for name, source in self.states.items()}
        state |= self.progress.state_dict() | {"random": random} | self.constants | self.log.state()
        self._thread = threading.Thread(target=self._write, args=(copy_to_cpu(state), is_best), name="checkpoint")
        self._thread.start()

    def finish(self, is_stopped: bool) -> None:
        """Save the last state unless it is saved, and wait for the disk. is_stopped: a signal ended the run."""
        self.wait()
        progress = self.progress
        unsaved = self.world.is_main and (self.saved_step != progress.step or progress.pending is not None)
        (any_unsaved,) = self.world.all_reduce_max(int(unsaved))
        if any_unsaved and (is_stopped or progress.step > 0 or progress.pending is not None):
            self.save()
        self.wait()

    def wait(self) -> None:
        """Wait for the save in progress."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, state: dict[str, Any], is_best: bool) -> None:
        step, path = state["iter_num"], self.out_dir / checkpoint.NAME
        try:
            name = find_non_finite(state)
            if name is not None:
                raise ValueError(f"{name} holds numbers that are not finite")
            self.log.sync()  # a checkpoint never refers to log lines that the disk does not have
            checkpoint.write(self.out_dir, state, is_best)
        except Exception as e:  # training continues
            reason = (e.strerror if isinstance(e, OSError) else None) or first_line(e) or type(e).__name__
            if self.failure is None:
                self.log.info(
                    f"cannot save step {step} in {path}: {reason}; older checkpoints are unchanged, training continues "
                    "without protection and tries again at the next save"
                )
            self.failure = reason
            return
        if self.failure is not None:
            self.log.info(f"saved step {step} in {path}: protected again")
        self.saved_step, self.failure = step, None


def copy_to_cpu(value: Any, seen: dict[Any, Tensor] | None = None) -> Any:
    """Copy nested dicts and lists with all tensors on the CPU. Tensors that share memory still share it."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if value.numel() == 0 or key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        return {key: copy_to_cpu(v, seen) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_cpu(v, seen) for v in value)
    return value


def find_non_finite(value: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity, or None."""
    if isinstance(value, Tensor):
        return name if value.is_floating_point() and not value.isfinite().all() else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = (find_non_finite(v, f"{name}/{key}" if name else str(key)) for key, v in items)
    return next((bad for bad in found if bad is not None), None)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators, which dropout and router noise draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
