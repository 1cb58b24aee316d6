"""Runs as they lie on disk, and which of them may be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.arms import ARMS, arm_of
from trainer.errors import UserError
from trainer.files import parse_json, read_text

# What may differ between runs of one arm: names and places, not what is computed.
NAMES = {
    *("out_dir", "seed", "init_from", "wandb_log", "wandb_project", "wandb_run_name", "log_interval", "history"),
    *("checkpoint_interval", "checkpoint_minutes", "always_save_checkpoint"),
}
# What a run's bits depend on beside its settings: told when it differs, no reason to refuse.
SURROUNDINGS = {"threads", "python", "torch", "platform", "git_commit", "device", "dtype", "compile"}
# Runs that differ in one of these answer different questions.
SAME = (
    *("dataset", "data_sha256", "max_iters", "eval_interval", "eval_iters"),
    *("batch_size", "block_size", "gradient_accumulation_steps"),
    *("n_layer", "n_head", "n_embd", "n_exp", "top_k", "stride", "bias"),
)


@dataclass(frozen=True)
class Run:
    """One finished run: its settings and its logged lines."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    decisions: list[dict[str, Any]]  # prune proposals that opened or were withdrawn

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the lines that have a value of that metric."""
        found = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]


def load_run(folder: Path) -> Run:
    """The run in a folder. Raises UserError if it is none, is not finished, or its validation loss is no number."""
    try:
        config = parse_json(read_text(folder / "config.json"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"{folder}: no {Path(e.filename).name}, so this is no run") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: cannot be read ({e})") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: config.json is not that of a run")
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = parse_json(line)
            lines.append(values | {"step": int(values["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{folder}: line {number} of metrics.jsonl is cut or damaged") from None
    return checked(Run(folder, config, lines, _decisions(folder / "decisions.jsonl")))


def checked(run: Run) -> Run:
    """The run, if it is finished and its validation losses are numbers. Raises UserError if not."""
    folder, config, lines = run.folder, run.config, run.lines
    if not all(isinstance(config.get(key), int) for key in ("seed", "max_iters")):
        raise UserError(f"{folder}: its settings are not those of a run")
    step = lines[-1]["step"] if lines else 0
    if step < config["max_iters"]:
        raise UserError(f"{folder}: at step {step} of {config['max_iters']}, still training or stopped")
    changed = _changed_on_the_way(config)
    if changed:
        raise UserError(f"{folder}: it was resumed with another {', '.join(changed)}, so it is no run of one setting")
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    if not losses or not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses):
        raise UserError(f"{folder}: a validation loss is missing or no number")
    return run


def _changed_on_the_way(config: dict[str, Any]) -> list[str]:
    """Settings that a resumed run was given anew and that what it computes depends on."""
    history = config.get("history")
    starts = [start for start in history if isinstance(start, dict)] if isinstance(history, list) else []
    keys = {key for start in starts if isinstance(start.get("changed"), dict) for key in start["changed"]}
    return sorted(keys - NAMES - SURROUNDINGS - {"max_iters", "eval_only", "backend"})


def _decisions(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def load_runs(sources: Iterable[Any], load: Callable[[Any], Run] = load_run) -> tuple[list[Run], list[str]]:
    """The runs that can be compared with the first one, and a line for each that cannot, saying why.

    sources: folders, or whatever `load` makes a Run of.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    for source in sources:
        try:
            run = load(source)
        except UserError as e:
            left_out.append(str(e))
            continue
        different = [key for key in SAME if runs and run.config.get(key) != runs[0].config.get(key)]
        if different:
            key = different[0]
            theirs, ours = run.config.get(key), runs[0].config.get(key)
            left_out.append(f"{run.folder}: {key} is {theirs}, in {runs[0].folder} {ours}")
        else:
            runs.append(run)
    return runs, left_out


def group_into_arms(runs: list[Run]) -> tuple[dict[str, dict[int, Run]], dict[str, list[str]], list[str]]:
    """Runs by arm and seed; the settings in which runs differ, with their values; a line for each run left out.

    An arm is one set of settings: a run of the same arm with other settings is left out.
    """
    keys = [key for key in runs[0].config if key not in NAMES] if runs else []
    differing = {
        key: values for key in keys if len(values := sorted({json.dumps(run.config.get(key)) for run in runs})) > 1
    }
    settings = [key for key in differing if key not in SURROUNDINGS]
    arms: dict[str, dict[int, Run]] = {}
    left_out = []
    for run in runs:
        members = arms.setdefault(arm_of(run.config), {})
        first = next(iter(members.values()), run)
        other = [key for key in settings if run.config.get(key) != first.config.get(key)]
        if other:
            ours, theirs = run.config.get(other[0]), first.config.get(other[0])
            left_out.append(f"{run.folder}: {other[0]} is {ours}, in {first.folder} of the same arm {theirs}")
        elif run.seed in members:
            left_out.append(f"{run.folder}: seed {run.seed} of this arm is already {members[run.seed].folder}")
        else:
            members[run.seed] = run
    order = [*ARMS, *arms]
    return dict(sorted(arms.items(), key=lambda item: order.index(item[0]))), differing, left_out


def pairs(arms: dict[str, dict[int, Run]], a: str, b: str) -> list[tuple[Run, Run]]:
    """The runs of arms a and b with the same seed."""
    return [(arms[a][seed], arms[b][seed]) for seed in sorted(arms[a].keys() & arms[b].keys())]
