"""What a run begins from: nothing, weights of another, or its own checkpoint with the settings to go on with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe.beta import derangement
from chronomoe.config import THRESHOLDS
from trainer import checkpoint as checkpoints
from trainer import settings as setting
from trainer.arms import arm_of
from trainer.environment import UNKNOWN
from trainer.errors import UserError
from trainer.ranks import Ranks, job
from trainer.runlog import evaluations_in, history_in, holds_a_run
from trainer.settings import Settings
from trainer.streams import DROPOUT_AND_NOISE, stream_seed
from trainer.weights import OF_EXPERTS, digest, plain_names, without_state
from trainer.weights import find as find_weights

MOST_UNSAVED = 2  # evaluations logged while the first checkpoint is being written
AUTO = "auto:"  # how an init_from begins that names weights to start from if there is nothing to resume
BETA = "router_state.beta_coeff"


@dataclass
class Start:
    """Settings, and if a run is resumed its checkpoint (tensors on the CPU), and what is to be said about that."""

    settings: Settings
    saved: dict[str, Any] | None = None
    weights: dict[str, Tensor] | None = None  # of another run or of GPT-2, to start from
    weights_from: str | None = None  # what init_from named when the run began; None: from scratch
    weights_sha256: str | None = None  # of those weights
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
    would_start = not starts_anew(init_from) and not again and not checkpoints.exists(out_dir)
    # a run that is killed before its first checkpoint has few evaluations; more are not thrown away unasked
    if would_start and not given.get("eval_only") and evaluations_in(out_dir) > MOST_UNSAVED:
        raise UserError(
            f"{out_dir} has the logs of a run and no checkpoint: if it had one, put its {checkpoints.NAME} back; else "
            "give another --out_dir, or remove it"
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
        return _from_weights(given, "scratch" if init_from == "auto" else init_from.removeprefix(AUTO))
    saved, notes, damaged = checkpoints.newest(out_dir)
    before = _settings_in(saved, out_dir / checkpoints.NAME)
    for key in setting.names_with_role("model"):
        if key in given and key in before and given[key] != before[key]:
            raise UserError(
                f"{key}={given[key]}, but the checkpoint in {out_dir} has {key}={before[key]}: a model's shape cannot "
                f"change on resume; leave {key} out, or start a run with another --out_dir"
            )
    ours = checkpoints.is_ours(saved)
    of_a_start = setting.names_with_role("start")
    not_taken = of_a_start + setting.names_with_role("machine")
    if not ours:
        not_taken += setting.names_with_role("numerics")  # nanoMoE's defaults, which its user did not choose
    merged = {key: value for key, value in before.items() if key not in not_taken} | given
    if ours and given.get("dtype") == "auto":
        merged["dtype"] = before.get("dtype", "auto")  # a run keeps its precision
    if "arm" not in given and arm_of(merged) != arm_of(before):
        merged["arm"] = ""  # the keys that are given make it another one
    s = setting.from_values(merged)
    if s.max_iters < saved["iter_num"] and not s.eval_only:
        raise UserError(
            f"max_iters={s.max_iters}, but the checkpoint in {out_dir} is of step {saved['iter_num']}: give at least "
            "that many steps, or start a run with another --out_dir"
        )
    # a key that an older version did not have was at its default, but for the arm
    was = {key: option.default for key, option in setting.keys().items() if ours and key != "arm"} | before
    changed = {
        key: [was[key], value]
        for key, value in s.flat().items()
        if key in was and was[key] != value and value != "auto" and key not in of_a_start
    }
    notes += [f"resume: {key}={now}, before {earlier}" for key, (earlier, now) in changed.items()]
    vocab_size = saved["model_args"].get("vocab_size")
    source, sha256 = _origin(saved, str(out_dir / checkpoints.NAME))
    return Start(s, saved, None, source, sha256, vocab_size, changed, notes, damaged)


def _origin(saved: dict[str, Any], path: str) -> tuple[str | None, str | None]:
    """(weights_from, weights_sha256) of a run that is resumed from the checkpoint at `path`."""
    if "weights_from" in saved:
        return saved["weights_from"], saved.get("weights_sha256")
    if not checkpoints.is_ours(saved):
        return path, digest(plain_names(saved["model"]))
    # an older version of this program recorded what the last start's init_from was, not the first one's
    config = saved.get("config")
    from_scratch = isinstance(config, dict) and config.get("init_from") == "scratch"
    return (None, None) if from_scratch else (UNKNOWN, UNKNOWN)


def _from_weights(given: dict[str, Any], source: str) -> Start:
    """A new run, from scratch or from weights that are there; a key of the model that is not given is theirs.

    To evaluate, the loop's settings and its state are theirs too; to train, the loop begins anew.
    """
    if source == "scratch":
        return Start(setting.from_values(given))
    weights, found = find_weights(source)
    known = setting.keys()
    theirs = {key: setting.check(known[key], value, source) for key, value in found.items() if key in known}
    dense = theirs.get("n_exp", 1) == 1
    for key in setting.names_with_role("model"):
        value = theirs.get(key, given.get(key))
        cropped = key == "block_size" and key in given and given[key] < value
        may_change = dense and key in OF_EXPERTS
        if given.get(key, value) != value and not may_change and not cropped:
            raise UserError(f"{key}={given[key]}, but the weights of {source} have {key}={value}: leave {key} out")
    notes = [f"weights: from {source}"]
    if dense or not given.get("eval_only"):
        beta = weights.get(BETA)
        if beta is not None and beta.any():
            notes.append(f"weights: beta starts at 0, not at that of {source}")
        weights = without_state(weights)
        theirs = {key: value for key, value in theirs.items() if not key.startswith(setting.PREFIX)}
    if dense:
        theirs = {key: value for key, value in theirs.items() if key not in OF_EXPERTS}
    s = setting.from_values(theirs | given)
    vocab_size, sha256 = found.get("vocab_size"), digest(without_state(weights))
    return Start(s, None, weights, source, sha256, vocab_size, notes=notes)


def _whence(given: dict[str, Any]) -> tuple[str, Path]:
    defaults = Settings()
    init_from = given.get("init_from", defaults.init_from)
    source = init_from.removeprefix(AUTO)
    if source != init_from and (source in ("", "auto", "resume") or source.startswith(AUTO)):
        raise UserError(f"init_from={init_from!r}: write auto:gpt2, or auto:PATH of a checkpoint to start from")
    return init_from, Path(given.get("out_dir", defaults.out_dir))


def starts_anew(init_from: str) -> bool:
    """Whether a checkpoint in out_dir is not resumed."""
    return init_from not in ("resume", "auto") and not init_from.startswith(AUTO)


def _settings_in(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys that a checkpoint was trained with, in their types. Raises UserError if one has a wrong type."""
    config = saved.get("config")
    found = (config if isinstance(config, dict) else {}) | saved["model_args"]
    known = setting.keys()
    values = {key: setting.check(known[key], value, str(path)) for key, value in found.items() if key in known}
    threshold, signal = setting.PREFIX + "bridge_threshold", setting.PREFIX + "bridge_signal"
    if threshold in values and values[threshold] == THRESHOLDS.get(values.get(signal)):
        values[threshold] = None  # an older version saved the default as a number
    return values


def known_files(start: Start) -> dict[str, dict[str, Any]] | None:
    """The fingerprint of the files that a resumed run was trained on, if the dataset has the same name now."""
    saved = start.saved or {}
    before, config = saved.get("data"), saved.get("config")
    same = isinstance(config, dict) and config.get("dataset") == start.settings.dataset
    return before if same and isinstance(before, dict) else None


def check_data(start: Start, now: dict[str, dict[str, Any]]) -> None:
    """Compare the dataset's files with those that a resumed run was trained on.

    Another dataset with other contents is recorded in start.changed. Raises UserError if files of the same dataset
    have changed.
    """
    for name, was in (known_files(start) or {}).items():
        if name in now and was["sha256"] != now[name]["sha256"]:
            raise UserError(
                f"{name} of {start.settings.dataset} has changed since the run began (sha256 "
                f"{now[name]['sha256'][:12]}..., then {was['sha256'][:12]}...): put the old file back, or start a new "
                "run"
            )
    before = start.saved.get("data") if start.saved else None
    if isinstance(before, dict) and now:
        was, is_now = ({name: look["sha256"] for name, look in files.items()} for files in (before, now))
        if was != is_now:
            start.changed["data_sha256"] = [was, is_now]
            start.notes.append("resume: the data have other contents than before")


def restore(saved: dict[str, Any], path: Path, model: Any, optimizer: Any, loop: Any, guard: Any, scaler: Any) -> None:
    """Put a checkpoint's state into what `build` made. Raises UserError if it does not fit."""
    try:
        # nanoMoE saves compiled models under a prefix, and knows no router_state
        weights = plain_names(saved["model"])
        model.load_state_dict(model.router_state.state_dict(prefix="router_state.") | weights)
        # the fused step is the one that can be skipped on the device
        fused = [group | {"fused": True, "foreach": None} for group in saved["optimizer"]["param_groups"]]
        optimizer.load_state_dict(saved["optimizer"] | {"param_groups": fused})
        for p, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != p.shape:
                    raise ValueError(f"the optimizer's {name} is {list(state[name].shape)}, not {list(p.shape)}")
        if "chrono" in saved:
            # an older version did not save the permutation of signal 'shuffled', and drew it from the run's seed
            drawn = derangement(*loop.follows.shape, saved.get("config", {}).get("seed", 0))
            loop.load_state_dict({"shuffled": {"follows": drawn}} | saved["chrono"])
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


def best_loss(saved: dict[str, Any], out_dir: Path) -> float:
    """The validation loss of ckpt_best.pt; infinite if that is not there. nanoMoE saves the loss as a tensor."""
    if not os.path.exists(out_dir / checkpoints.BEST):  # older versions counted step 0, which is not saved
        return math.inf
    value = saved.get("best_val_loss")
    return float(value) if isinstance(value, (int, float, Tensor)) and torch.as_tensor(value).numel() == 1 else math.inf
