"""What a run begins from: nothing, weights of another, or its own checkpoint with the settings to go on with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint as checkpoints
from trainer import settings as setting
from trainer.arms import contradiction
from trainer.errors import UserError
from trainer.ranks import Ranks, job
from trainer.runlog import history_in, holds_a_run
from trainer.settings import Settings
from trainer.streams import DROPOUT_AND_NOISE, stream_seed
from trainer.weights import find as find_weights


@dataclass
class Start:
    """Settings, and if a run is resumed its checkpoint (tensors on the CPU), and what is to be said about that."""

    settings: Settings
    saved: dict[str, Any] | None = None
    weights: dict[str, Tensor] | None = None  # of another run or of GPT-2, to start from
    vocab_size: int | None = None  # where the weights fix it
    changed: dict[str, list[Any]] = field(default_factory=dict)  # key: [before, now]
    notes: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)  # checkpoints passed over


def is_started_again(given: dict[str, Any]) -> bool:
    """torchrun has started the same command again after a failure, and what is in out_dir is its own."""
    history = history_in(_whence(given)[1] / "config.json")
    last = history[-1] if history and isinstance(history[-1], dict) else {}
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and last.get("job") == job() is not None


def folder(given: dict[str, Any], again: bool = False) -> Path:
    """The out_dir of these keys. Raises UserError if a new run would overwrite one, or there is none to resume.

    again: a run that is there is this one's own.
    """
    init_from, out_dir = _whence(given)
    if starts_anew(init_from) and not again and not given.get("eval_only") and holds_a_run(out_dir):
        raise UserError(
            f"{out_dir} holds a run already; continue it with --init_from=resume, give another --out_dir, or remove it"
        )
    if init_from == "resume" and not checkpoints.exists(out_dir):
        raise UserError(
            f"there is no checkpoint {out_dir / checkpoints.NAME} to resume from; "
            "--init_from=auto starts the run if there is none"
        )
    return out_dir


def begin(given: dict[str, Any], again: bool = False) -> Start:
    """Where to begin, by the keys that the user gave; the others are the checkpoint's on resume, else defaults.

    again: go on with a run that is in out_dir, whatever init_from says, if it has a checkpoint.
    Raises UserError if the keys make no sense, or the checkpoint cannot be used or does not fit them.
    """
    init_from, out_dir = _whence(given)
    goes_on = (again or not starts_anew(init_from)) and checkpoints.exists(out_dir)
    if not goes_on:
        return _from_weights(given, "scratch" if init_from == "auto" else init_from)
    saved, notes, damaged = checkpoints.newest(out_dir)
    before = _settings_in(saved, out_dir / checkpoints.NAME)
    for key in setting.names_with_role("model"):
        if key in given and key in before and given[key] != before[key]:
            raise UserError(
                f"{key}={given[key]}, but the checkpoint in {out_dir} has {key}={before[key]}: a model's shape cannot "
                f"change on resume; leave {key} out, or start a run with another --out_dir"
            )
    not_taken = setting.names_with_role("start", "machine")
    if not checkpoints.is_ours(saved):
        not_taken += setting.names_with_role("numerics")  # nanoMoE's defaults, which its user did not choose
    merged = {key: value for key, value in before.items() if key not in not_taken} | given
    if "arm" not in given and contradiction(merged.get("arm", ""), merged):
        merged["arm"] = ""  # the keys that are given make it another one
    s = setting.from_values(merged)
    changed = {
        key: [before[key], value]
        for key, value in s.flat().items()
        if key in before and before[key] != value and value != "auto" and key not in ("init_from", "out_dir")
    }
    notes += [f"resume: {key}={now}, before {was}" for key, (was, now) in changed.items()]
    return Start(s, saved, None, saved["model_args"].get("vocab_size"), changed, notes, damaged)


def _from_weights(given: dict[str, Any], source: str) -> Start:
    """A new run, from scratch or from weights that are there; a key of the shape that is not given is theirs."""
    if source == "scratch":
        return Start(setting.from_values(given))
    weights, model_args = find_weights(source)
    known = setting.keys()
    theirs = {
        k: setting.check(known[k], v, source) for k, v in model_args.items() if k in setting.names_with_role("model")
    }
    dense = theirs.get("n_exp", 1) == 1
    may_change = {"n_exp", "stride", "use_noisy_top_k"} if dense else set()
    for key, value in theirs.items():
        cropped = key == "block_size" and given.get(key, value) < value
        if given.get(key, value) != value and key not in may_change and not cropped:
            raise UserError(f"{key}={given[key]}, but the weights of {source} have {key}={value}: leave {key} out")
    if dense:
        theirs = {k: v for k, v in theirs.items() if k not in may_change}
    s = setting.from_values(theirs | given)
    return Start(s, weights=weights, vocab_size=model_args.get("vocab_size"), notes=[f"weights: from {source}"])


def _whence(given: dict[str, Any]) -> tuple[str, Path]:
    defaults = Settings()
    init_from = given.get("init_from", defaults.init_from)
    return init_from, Path(given.get("out_dir", defaults.out_dir))


def starts_anew(init_from: str) -> bool:
    """Not a run of its own that goes on."""
    return init_from not in ("resume", "auto")


def _settings_in(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys that a checkpoint was trained with, in their types. Raises UserError if one has a wrong type."""
    config = saved.get("config")
    found = (config if isinstance(config, dict) else {}) | saved["model_args"]
    known = setting.keys()
    return {key: setting.check(known[key], value, str(path)) for key, value in found.items() if key in known}


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
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path} does not fit its own settings: {reason}") from None


def restore_random_state(saved: dict[str, Any], device: torch.device, ranks: Ranks, seed: int) -> list[str]:
    """Let dropout and router noise go on where this rank's stopped; lines on what cannot."""
    if "random" not in saved:
        return []
    states = saved["random"]
    if ranks.rank < len(states):
        checkpoints.restore_random_state(states[ranks.rank], device)
    else:
        torch.manual_seed(stream_seed(seed, DROPOUT_AND_NOISE, ranks.rank, saved["iter_num"]))
    if len(states) == ranks.count:
        return []
    return [f"resume: {ranks.count} ranks, before {len(states)}: dropout and router noise are drawn anew"]


def best_loss(saved: dict[str, Any]) -> float:
    """The lowest validation loss so far; nanoMoE saves it as a tensor."""
    value = saved.get("best_val_loss")
    return float(value) if isinstance(value, (int, float, Tensor)) and torch.as_tensor(value).numel() == 1 else math.inf
