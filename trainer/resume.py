"""What a run begins from: nothing, or its own checkpoint with the settings to go on with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint as checkpoints
from trainer import settings as setting
from trainer.errors import UserError
from trainer.runlog import holds_a_run
from trainer.settings import Settings

# What fixes the weights: it cannot change on resume.
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "n_exp", "stride", "use_noisy_top_k")
# What belongs to a start and its machine: a checkpoint's is not taken over.
OF_A_START = ("init_from", "out_dir", "eval_only", "device", "backend", "wandb_log", "wandb_project", "wandb_run_name")
# Nor, from a checkpoint of nanoMoE, what its program takes by default and this one by choice.
OF_A_PROGRAM = ("dtype", "compile")


@dataclass
class Start:
    """Settings, and if a run is resumed its checkpoint (tensors on the CPU) and what is to be said about that."""

    settings: Settings
    saved: dict[str, Any] | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)  # key: [before, now]
    notes: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)  # checkpoints passed over


def folder(given: dict[str, Any]) -> Path:
    """The out_dir of these keys. Raises UserError if a new run would overwrite one, or there is none to resume."""
    init_from, out_dir = _whence(given)
    if init_from == "scratch" and not given.get("eval_only") and holds_a_run(out_dir):
        raise UserError(
            f"{out_dir} holds a run already; continue it with --init_from=resume, give another --out_dir, or remove it"
        )
    if init_from == "resume" and not checkpoints.exists(out_dir):
        raise UserError(
            f"there is no checkpoint {out_dir / checkpoints.NAME} to resume from; "
            "--init_from=auto starts the run if there is none"
        )
    return out_dir


def begin(given: dict[str, Any]) -> Start:
    """Where to begin, by the keys that the user gave; the others are the checkpoint's on resume, else defaults.

    Raises UserError if the keys make no sense, or the checkpoint cannot be used or does not fit them.
    """
    folder(given)
    init_from, out_dir = _whence(given)
    if init_from == "scratch" or (init_from == "auto" and not checkpoints.exists(out_dir)):
        return Start(setting.from_values(given))
    saved, notes, damaged = checkpoints.newest(out_dir)
    before = _settings_in(saved, out_dir / checkpoints.NAME)
    for key in SHAPE:
        if key in given and key in before and given[key] != before[key]:
            raise UserError(
                f"{key}={given[key]}, but the checkpoint in {out_dir} has {key}={before[key]}: a model's shape cannot "
                f"change on resume; leave {key} out, or start a run with another --out_dir"
            )
    not_taken = OF_A_START if checkpoints.is_ours(saved) else OF_A_START + OF_A_PROGRAM
    s = setting.from_values({key: value for key, value in before.items() if key not in not_taken} | given)
    changed = {
        key: [before[key], value]
        for key, value in s.flat().items()
        if key in before and before[key] != value and value != "auto" and key not in ("init_from", "out_dir")
    }
    notes += [f"resume: {key}={now}, before {was}" for key, (was, now) in changed.items()]
    return Start(s, saved, changed, notes, damaged)


def _whence(given: dict[str, Any]) -> tuple[str, Path]:
    defaults = Settings()
    return given.get("init_from", defaults.init_from), Path(given.get("out_dir", defaults.out_dir))


def _settings_in(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys that a checkpoint was trained with, in their types. Raises UserError if one has a wrong type."""
    config = saved.get("config")
    found = (config if isinstance(config, dict) else {}) | saved["model_args"]
    known = setting.keys()
    return {key: known[key].check(value, str(path)) for key, value in found.items() if key in known}


def check_data(saved: dict[str, Any], dataset: str, now: dict[str, dict[str, Any]]) -> None:
    """Raises UserError if the dataset's files are not those that the run began with."""
    before = saved.get("data")
    if not isinstance(before, dict) or saved.get("config", {}).get("dataset") != dataset:
        return
    for name, print_of in now.items():
        was = before[name]["sha256"] if name in before else None
        if was is not None and was != print_of["sha256"]:
            raise UserError(
                f"{name} of {dataset} has changed since the run began (sha256 {print_of['sha256'][:12]}..., then "
                f"{was[:12]}...): put the old file back, or start a new run"
            )


def restore(saved: dict[str, Any], path: Path, model: Any, optimizer: Any, loop: Any, guard: Any, scaler: Any) -> None:
    """Put a checkpoint's state into what `build` made. Raises UserError if it does not fit."""
    try:
        # nanoMoE saves compiled models under a prefix, and knows no router_state
        weights = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
        model.load_state_dict(model.router_state.state_dict(prefix="router_state.") | weights)
        # the fused step is the one that can be skipped on the device
        fused = [group | {"fused": True, "foreach": None} for group in saved["optimizer"]["param_groups"]]
        optimizer.load_state_dict(saved["optimizer"] | {"param_groups": fused})
        for p, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    raise ValueError(f"the optimizer's {name} is {list(state[name].shape)}, not {list(p.shape)}")
        if "chrono" in saved:
            loop.load_state_dict(saved["chrono"])
        if "guard" in saved:
            guard.load_state_dict(saved["guard"])
        if saved.get("scaler"):  # empty where the saved run needed none
            scaler.load_state_dict(saved["scaler"])
        if "random" in saved:
            checkpoints.restore_random_state(saved["random"], model.router_state.beta_coeff.device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path} does not fit its own settings: {reason}") from None


def best_loss(saved: dict[str, Any]) -> float:
    """The lowest validation loss so far; nanoMoE saves it as a tensor."""
    value = saved.get("best_val_loss")
    return float(value) if isinstance(value, (int, float, Tensor)) and torch.as_tensor(value).numel() == 1 else math.inf
