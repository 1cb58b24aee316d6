"""Decide what a run starts from: nothing, other weights, or its own checkpoint; and with which settings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from chronomoe.config import THRESHOLDS
from chronomoe.signals import SignalState, derangement
from model import GPT
from trainer import checkpoint, cli
from trainer import settings as setting
from trainer.arms import arm_of
from trainer.distributed import torchrun_id
from trainer.environment import UNKNOWN
from trainer.errors import UserError
from trainer.runlog import check_is_own, history_in, holds_a_run, is_complete
from trainer.settings import Settings
from trainer.streams import PERMUTATION, stream_seed
from trainer.weights import (
    COMPILED,
    EXPERT_FIELDS,
    checkpoint_path,
    complete_weights,
    find_weights,
    is_gpt2,
    weights_sha256,
    without_state,
)

MAX_UNSAVED = 2  # evaluations that can be logged before the first checkpoint is written
AUTO = "auto:"  # prefix of an init_from: resume, or else start from the weights that follow
BETA = "router_state.beta_coeff"


@dataclass
class Start:
    """The settings of a run, and what it starts from. Tensors are on the CPU."""

    settings: Settings
    saved: dict[str, Any] | None = None  # the checkpoint to resume
    weights: dict[str, Tensor] | None = None  # weights to start from
    weights_from: str | None = None  # the init_from of the run's first start; None: from scratch
    weights_sha256: str | None = None  # of those weights
    vocab_size: int | None = None  # of the weights or the checkpoint
    changed: dict[str, list[Any]] = field(default_factory=dict)  # settings that changed: [before, now]
    notes: list[str] = field(default_factory=list)  # for the user
    damaged: list[Path] = field(default_factory=list)  # checkpoints that were skipped
    is_resumed: bool = False


def is_restart(given: dict[str, Any]) -> bool:
    """Whether torchrun restarted this command after a failure, and the run in out_dir is its own."""
    history = history_in(_source(given)[1] / "config.json")
    last = history[-1] if history and isinstance(history[-1], dict) else {}
    job = torchrun_id()
    is_second = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return is_second and job is not None and last.get("job") == job


def run_folder(given: dict[str, Any], is_restart: bool = False) -> Path:
    """The out_dir of these settings. is_restart: a run in it is this run.

    Raises UserError if a run would overwrite what it has not written, or if there is no run to resume.
    """
    init_from, out_dir = _source(given)
    if ignores_checkpoint(init_from) and not is_restart and not given.get("eval_only") and holds_a_run(out_dir):
        raise UserError(
            f"{out_dir} holds a run already; continue it with --init_from=resume, use another --out_dir, or remove it"
        )
    if init_from == "resume" and not checkpoint.exists(out_dir):
        raise UserError(
            f"there is no checkpoint {out_dir / checkpoint.NAME} to resume from; "
            "--init_from=auto starts the run if there is none"
        )
    would_start = not ignores_checkpoint(init_from) and not is_restart and not checkpoint.exists(out_dir)
    # a run killed before its first checkpoint has few evaluations; do not overwrite the logs of a longer run
    if would_start and not given.get("eval_only") and is_complete(out_dir, MAX_UNSAVED):
        raise UserError(
            f"{out_dir} has the logs of a run but no checkpoint: if it had one, put its {checkpoint.NAME} back; else "
            "use another --out_dir, or remove it"
        )
    if not given.get("eval_only"):
        check_is_own(out_dir)
    return out_dir


def resolve_start(given: dict[str, Any], is_restart: bool = False) -> Start:
    """Resolve what to start from. Settings that are not given are the checkpoint's on resume, else the defaults.

    given: the settings that the user gave. is_restart: resume the run in out_dir if it has a checkpoint, whatever
    init_from says. Raises UserError if the settings are invalid, or the checkpoint is unusable or does not fit them.
    """
    init_from, out_dir = _source(given)
    resumes = (is_restart or not ignores_checkpoint(init_from)) and checkpoint.exists(out_dir)
    if not resumes:
        return _start_from(given, "scratch" if init_from == "auto" else init_from.removeprefix(AUTO))
    saved, notes, damaged = checkpoint.newest(out_dir)
    before = _saved_settings(saved, out_dir / checkpoint.NAME)
    for key in setting.names_with_role("model"):
        if key in given and key in before and given[key] != before[key]:
            raise UserError(
                f"{key}={given[key]}, but the checkpoint in {out_dir} has {key}={before[key]}: a model's shape cannot "
                f"change on resume; leave {key} out, or start a run with another --out_dir"
            )
    ours = checkpoint.is_ours(saved)
    per_start = setting.names_with_role("start")
    not_kept = per_start + setting.names_with_role("machine")
    if not ours:
        not_kept += setting.names_with_role("numerics")  # nanoMoE's defaults, which its user did not choose
    merged = {key: value for key, value in before.items() if key not in not_kept} | given
    if ours and given.get("dtype") == "auto":
        merged["dtype"] = before.get("dtype", "auto")  # a run keeps its precision
    if "arm" not in given and arm_of(merged) != arm_of(before):
        merged["arm"] = ""  # the given settings define another arm
    s = setting.from_values(merged)
    if s.max_iters < saved["iter_num"] and not s.eval_only:
        raise UserError(
            f"max_iters={s.max_iters}, but the checkpoint in {out_dir} is of step {saved['iter_num']}: give at least "
            "that many steps, or start a run with another --out_dir"
        )
    # a setting that an older version did not have was at its default, except the arm
    was = {key: option.default for key, option in setting.keys().items() if ours and key != "arm"} | before
    changed = {
        key: [was[key], value]
        for key, value in s.flat().items()
        if key in was and was[key] != value and value != "auto" and key not in per_start
    }
    notes += [f"resume: {key}={now}, before {earlier}" for key, (earlier, now) in changed.items()]
    vocab_size = saved["model_args"].get("vocab_size")
    source, sha256 = _origin(saved, str(out_dir / checkpoint.NAME))
    return Start(s, saved, None, source, sha256, vocab_size, changed, notes, damaged, is_resumed=True)


def _origin(saved: dict[str, Any], path: str) -> tuple[str | None, str | None]:
    """(weights_from, weights_sha256) of the run whose checkpoint is at `path`."""
    if "weights_from" in saved:
        return saved["weights_from"], saved.get("weights_sha256")
    if not checkpoint.is_ours(saved):
        return path, weights_sha256({name.removeprefix(COMPILED): value for name, value in saved["model"].items()})
    # an older version recorded the init_from of the last start, not of the first one
    from_scratch = saved.get("config", {}).get("init_from") == "scratch"
    return (None, None) if from_scratch else (UNKNOWN, UNKNOWN)


def _start_from(given: dict[str, Any], source: str) -> Start:
    """Start a new run, from scratch or from weights. Model settings that are not given are those of the weights.

    With eval_only the loop's settings and state are those of the weights too; otherwise the loop starts fresh.
    """
    if source == "scratch":
        return Start(setting.from_values(given))
    weights, found = find_weights(source)
    known = setting.keys()
    theirs = {key: cli.check(known[key], value, source) for key, value in found.items() if key in known}
    dense = theirs.get("n_exp", 1) == 1
    for key in setting.names_with_role("model"):
        value = theirs.get(key, given.get(key))
        cropped = key == "block_size" and key in given and given[key] < value
        may_change = dense and key in EXPERT_FIELDS
        if given.get(key, value) != value and not may_change and not cropped:
            raise UserError(f"{key}={given[key]}, but the weights of {source} have {key}={value}: leave {key} out")
    notes = [f"weights: from {source}"]
    if not is_gpt2(source):
        notes += checkpoint.notes_on(checkpoint_path(source))
    if dense or not given.get("eval_only"):
        beta = weights.get(BETA)
        if beta is not None and beta.any():
            notes.append(f"weights: beta starts at 0, not at that of {source}")
        weights = without_state(weights)
        theirs = {key: value for key, value in theirs.items() if not key.startswith(setting.PREFIX)}
    if dense:
        theirs = {key: value for key, value in theirs.items() if key not in EXPERT_FIELDS}
    s = setting.from_values(theirs | given)
    vocab_size, sha256 = found.get("vocab_size"), weights_sha256(without_state(weights))
    return Start(s, None, weights, source, sha256, vocab_size, notes=notes)


def _source(given: dict[str, Any]) -> tuple[str, Path]:
    defaults = Settings()
    init_from = given.get("init_from", defaults.init_from)
    source = init_from.removeprefix(AUTO)
    if source != init_from and (source in ("", "auto", "resume") or source.startswith(AUTO)):
        raise UserError(f"init_from={init_from!r}: write auto:gpt2, or auto:PATH of a checkpoint to start from")
    return init_from, Path(given.get("out_dir", defaults.out_dir))


def ignores_checkpoint(init_from: str) -> bool:
    """Whether this init_from starts a new run even if out_dir has a checkpoint."""
    return init_from not in ("resume", "auto") and not init_from.startswith(AUTO)


def _saved_settings(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a checkpoint, in their types. Raises UserError for a wrong type."""
    found = saved.get("config", {}) | saved["model_args"]
    known = setting.keys()
    values = {key: cli.check(known[key], value, str(path)) for key, value in found.items() if key in known}
    threshold, signal = setting.PREFIX + "bridge_threshold", setting.PREFIX + "bridge_signal"
    if threshold in values and values[threshold] == THRESHOLDS.get(str(values.get(signal))):
        values[threshold] = None  # an older version saved the default value
    return values


def known_files(start: Start) -> dict[str, dict[str, Any]] | None:
    """Fingerprints of the files that a resumed run was trained on; None if it had another dataset."""
    saved = start.saved or {}
    return saved.get("data") if saved.get("config", {}).get("dataset") == start.settings.dataset else None


def check_data(start: Start, now: dict[str, dict[str, Any]]) -> None:
    """Compare the dataset's files with those that a resumed run was trained on.

    Records another dataset with other contents in start.changed. Raises UserError if files of the same dataset have
    changed.
    """
    for name, was in (known_files(start) or {}).items():
        if name in now and was["sha256"] != now[name]["sha256"]:
            raise UserError(
                f"{name} of {start.settings.dataset} has changed since the run began (sha256 "
                f"{now[name]['sha256'][:12]}..., then {was['sha256'][:12]}...): restore the file, or start a new run"
            )
    before = start.saved.get("data") if start.saved else None
    if before is not None and now:
        was, is_now = ({name: f["sha256"] for name, f in files.items()} for files in (before, now))
        if was != is_now:
            start.changed["data_sha256"] = [was, is_now]
            start.notes.append("resume: the data differ from before")


def upgraded(saved: dict[str, Any], model: GPT) -> dict[str, Any]:
    """A checkpoint of nanoMoE or of an older version in the form of this version."""
    saved = saved | {"model": complete_weights(saved["model"], model)}
    # only the fused step can be skipped on the device
    groups = [group | {"fused": True, "foreach": None} for group in saved["optimizer"]["param_groups"]]
    saved["optimizer"] = saved["optimizer"] | {"param_groups": groups}
    chrono = saved.get("chrono")
    if chrono and "signals" not in chrono:
        # an older version saved only the permutation of signal 'shuffled'; one before it drew it from the run's seed
        seed = saved.get("config", {}).get("seed", 0)
        num_layers, num_experts = chrono["coherence"]["phi_slow"].shape
        signals = SignalState(num_layers, num_experts, model.config.chrono, stream_seed(seed, PERMUTATION))
        shuffled = chrono.get("shuffled") or {"follows": derangement(num_layers, num_experts, seed)}
        saved["chrono"] = chrono | {"signals": signals.state_dict() | shuffled}
    return saved
