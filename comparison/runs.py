"""Load finished runs from disk or from W&B, check that they are complete, and group them into arms and pairs.

Which keys of config.json must agree between two runs follows from the role of each key: trainer/settings.py has the
roles of the settings, trainer/environment.py those of the other keys.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chronomoe.options import is_active
from chronomoe.schedule import parse_ramp, parse_schedule
from trainer import checkpoint
from trainer.arms import ARMS, CUSTOM, arm_of, contradiction
from trainer.environment import ENVIRONMENT, UNKNOWN
from trainer.errors import UserError
from trainer.files import open_regular, parse_json, read_text
from trainer.settings import COMPARED, check_schedule, domain, keys

KEYS = keys()
ROLE_OF_KEY: dict[str, str] = {name: key.role for name, key in KEYS.items()} | ENVIRONMENT
SHOWN = (*COMPARED, "machine", "pair")  # roles of the keys that a report lists if they differ
PAIR_KEYS = tuple(key for key, role in ROLE_OF_KEY.items() if role == "pair")
LARGEST = 1e100  # of a metric; statistics of larger numbers overflow
RUN_FILES = ("config.json", "metrics.jsonl", checkpoint.NAME)  # a folder with one of them holds a run

Arms = dict[str, dict[int, "Run"]]  # runs by arm and seed


@dataclass(frozen=True)
class Run:
    """The settings and logs of one training run."""

    name: str  # its folder, or its name in W&B
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    decisions: list[dict[str, Any]]  # prune proposals that were opened or withdrawn
    folder: Path | None = None  # None: its files are not on this machine

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def arm(self) -> str:
        return self.config["arm"]

    @property
    def steps(self) -> int:
        return self.config["max_iters"]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The starts of train.py that made this run."""
        return self.config["history"]

    def values_over_starts(self, key: str) -> set[str]:
        """The values of a key in the starts whose steps are part of the run."""
        ends = [start["step"] for start in self.history[1:]] + [self.steps]
        kept = [start for start, end in zip(self.history, ends) if start["step"] < end]
        return {str(start.get(key, f"unknown in {self.name}")) for start in kept}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the lines that have a value of the metric."""
        found = [(line["step"], line[name]) for line in self.lines if line.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def values(self, name: str, after: float = -1) -> dict[int, list[float]]:
        """The values of a metric by step, for steps later than `after`.

        name: of a metric, or of a metric per layer, without its group and layer: "js" for "routing/L0/js".
        """
        found = {}
        for line in self.lines:
            names = [n for n in line if n == name or n.endswith("/" + name)] if line["step"] > after else []
            values = [line[n] for n in names if line[n] is not None]
            if values:
                found[line["step"]] = values
        return found

    def by_expert(self, name: str) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
        """(transformer block, expert) -> (steps, values) of a metric of the experts."""
        metrics = {metric for line in self.lines for metric in line}
        matches = [re.fullmatch(rf"expert/L(\d{{1,9}})_E(\d{{1,9}})/{name}", metric) for metric in metrics]
        found = sorted((int(m[1]), int(m[2]), m[0]) for m in matches if m)
        return {(block, e): self.series(metric) for block, e, metric in found if self.series(metric)[0]}


class Unusable(UserError):
    """A run that cannot be compared.

    Attributes:
        arm, seed: of the run; None if unknown.
        is_run: False if there is no run at all.
    """

    def __init__(self, message: str, config: Mapping[str, Any] | None = None, is_run: bool = True):
        super().__init__(message)
        config = config or {}
        arm, seed = config.get("arm") or (arm_of(config) if config else None), config.get("seed")
        self.arm = arm if isinstance(arm, str) else None
        self.seed = seed if isinstance(seed, int) else None
        self.is_run = is_run


def load_run(folder: Path) -> Run:
    """Load the run in a folder. Raises Unusable if there is none or if it cannot be compared; see `checked`."""
    saved = _last_checkpoint(folder)
    saved_config = saved.get("config")
    try:
        config = parse_json(read_text(folder / "config.json"))
        text = _text_of(folder / "metrics.jsonl")
        if not isinstance(config, dict):
            raise ValueError("config.json is not that of a run")
    except FileNotFoundError as e:
        is_run = any((folder / name).exists() for name in RUN_FILES)
        raise Unusable(f"{folder}: no {Path(e.filename).name}, so this is no run", saved_config, is_run) from None
    except OSError as e:
        raise Unusable(f"{e.filename or folder}: cannot be read ({e.strerror})", saved_config) from None
    except ValueError as e:
        raise Unusable(f"{folder}: cannot be read ({e})", saved_config) from None
    if "vocab_size" not in config and saved:
        config["vocab_size"] = saved["model_args"].get("vocab_size")  # older versions did not write it
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = parse_json(line)
            lines.append(values | {"step": int(values["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            raise Unusable(f"{folder}: line {number} of metrics.jsonl is cut or damaged", config) from None
    try:
        run = checked(Run(str(folder), config, lines, _decisions(folder / "decisions.jsonl"), folder))
        _check_digests(run, saved)
    except UserError as e:
        raise Unusable(str(e), config) from None
    return run


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    """The last checkpoint without its tensors; empty if it does not exist or is damaged."""
    try:
        return checkpoint.without_tensors(folder / checkpoint.NAME)
    except (FileNotFoundError, checkpoint.Damaged):
        return {}
    except OSError as e:
        raise Unusable(f"{e.filename or folder}: cannot be read ({e.strerror})") from None


def _text_of(path: Path) -> str:
    """The UTF-8 text of a log of any length. Raises OSError or ValueError."""
    with open_regular(path) as f:
        return f.read().decode()


def _decisions(path: Path) -> list[dict[str, Any]]:
    try:
        found = [parse_json(line) for line in _text_of(path).splitlines()]
        types = {"expert_id": str, "reason": str, "action": str, "step": int}
        if not all(isinstance(decision[key], kind) for decision in found for key, kind in types.items()):
            raise ValueError("a line is not a prune proposal")
        if not all(decision[key].isprintable() for decision in found for key in ("expert_id", "reason")):
            raise ValueError("a name holds a control character")  # vl_convert ends the process
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"{path}: cannot be read ({reason})") from None
    return found


def _check_digests(run: Run, saved: Mapping[str, Any]) -> None:
    """Raises UserError if the run's logs do not match the digests in its last checkpoint `saved`."""
    counts, digests = saved.get("lines"), saved.get("lines_sha256")
    if counts is None or digests is None:
        return
    for name in ("metrics", "decisions"):
        count, digest, path = counts.get(name), digests.get(name), run.folder / f"{name}.jsonl"
        if count is None or digest is None:
            continue
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(b"".join(content.splitlines(keepends=True)[:count])).hexdigest() != digest:
            raise UserError(f"{run.name}: {name}.jsonl is not what the run wrote (its SHA-256 differs)")


def check_is_last(run: Run, saved: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless the checkpoint `saved` in a file is that of the run's last step, with its settings."""
    if saved["iter_num"] != run.steps:
        raise UserError(f"{path} is of step {saved['iter_num']}, the run ended at {run.steps}")
    config = saved.get("config", {})
    compared = [key for key in ("seed", "arm", *differing(config, run.config)) if key in KEYS]
    other = [key for key in compared if value_of(config, key) != value_of(run.config, key)]
    if other:
        raise UserError(f"{path} is of another run: its {other[0]} is {value_of(config, other[0])!r}")


def checked(run: Run) -> Run:
    """The run, with its settings in their types and only the evaluations of its schedule.

    Raises UserError if the run is not finished, has no single setting, or its logs are incomplete.
    """
    name, config = run.name, run.config
    for key in ("seed", "max_iters", "eval_interval", "log_interval", "dataset"):
        if key not in config:
            raise UserError(f"{name}: its settings are not those of a run, {key} is missing")
    try:
        config = config | {key: KEYS[key].check(value) for key, value in config.items() if key in KEYS}
        check_schedule(config["dataset"], config.get("data_schedule") or "")
        if config.get("chrono_ramp"):
            parse_ramp(config["chrono_ramp"])
    except (ValueError, UserError) as e:
        raise UserError(f"{name}: its settings are not those of a run: {e}") from None
    run = replace(run, config=config)
    metrics = (v for line in run.lines for v in line.values() if v is not None)
    if not all(isinstance(v, (int, float)) and abs(v) < LARGEST for v in metrics):  # False for NaN
        raise UserError(f"{name}: a metric is not a number, or not below {LARGEST:g}")
    last = run.lines[-1]["step"] if run.lines else 0
    if last < run.steps or not run.lines:
        raise UserError(f"{name}: at step {last} of {run.steps}, still training or stopped")
    _check_arm(run)
    if config.get("weights_sha256") == UNKNOWN:
        raise UserError(f"{name}: an older version wrote it, and its initial weights are not known")
    if config.get("incomplete"):
        raise UserError(f"{name}: its logs are incomplete: {_joined(config['incomplete'])}")
    history = config.get("history")
    if not (history and isinstance(history, list) and all(_is_start(start) for start in history)):
        raise UserError(f"{name}: it has no history of its starts, so whether its settings changed is not known")
    changed = {key for start in history for key in start.get("changed") or {} if _must_not_change(key)}
    if changed:
        raise UserError(f"{name}: it was resumed with another {', '.join(sorted(changed))}, so it has no one setting")
    # recorded because a run that continues from another program's checkpoint does not begin at step 0
    return _with_complete_logs(replace(run, config=config | {"first_step": history[0]["step"]}))


def _check_arm(run: Run) -> None:
    """Raises UserError if the run has no arm, or if the arm does not match the settings."""
    name, config = run.name, run.config
    if "arm" not in config:
        resume = f"; train.py --init_from=resume --out_dir={name} adds it" if run.folder else ""
        raise UserError(f"{name}: an older version wrote it, without its arm{resume}")
    if config["arm"] not in (*ARMS, CUSTOM):
        raise UserError(f"{name}: there is no arm {config['arm']!r}")
    wrong = contradiction(config["arm"], config)
    if wrong is not None:
        raise UserError(f"{name}: its arm is {config['arm']!r}, but {wrong} is {config.get(wrong)!r}")


def _joined(sentences: Any) -> str:
    return "; ".join(map(str, sentences)) if isinstance(sentences, list) else str(sentences)


def _is_start(start: Any) -> bool:
    return (
        isinstance(start, dict) and isinstance(start.get("step"), int) and isinstance(start.get("changed") or {}, dict)
    )


def _must_not_change(key: str) -> bool:
    """Whether a run resumed with another value of the key cannot be compared. The number of steps may grow."""
    return ROLE_OF_KEY.get(key, "computed") in (*COMPARED, "arm", "seed") and ROLE_OF_KEY.get(key) != "length"


def _with_complete_logs(run: Run) -> Run:
    """The run with only the evaluations of its schedule. Raises UserError if a line is missing, repeated or extra."""
    name, steps = run.name, [line["step"] for line in run.lines]
    for before, step in itertools.pairwise(steps):
        if step <= before:
            raise UserError(f"{name}: step {step} is logged after step {before}: its lines are repeated or unordered")
    if steps[-1] > run.steps:
        raise UserError(f"{name}: it was logged up to step {steps[-1]}, beyond its max_iters of {run.steps}")
    first = run.history[0]["step"]

    def missing(interval: int, found: set[int]) -> int | None:
        """The first step of a schedule that is not in `found`; the last step is in every schedule."""
        start = interval * (max(first, 0) // interval + 1)
        expected = itertools.chain(range(start, run.steps, interval), [run.steps])
        return next((step for step in expected if step > first and step not in found), None)

    losses = {line["step"]: line["val/loss"] for line in run.lines if "val/loss" in line}
    step = missing(run.config["eval_interval"], losses.keys())
    step = 0 if first == 0 and 0 not in losses else step
    if step is not None:
        raise UserError(f"{name}: the evaluation of step {step} is missing from its logs")
    if not all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses.values()):
        raise UserError(f"{name}: a validation loss is not a number")
    schedule = run.config.get("data_schedule")
    for text in dict(parse_schedule(schedule)) if schedule else ():
        metric = f"val/{domain(text)}/loss"
        step = next((line["step"] for line in run.lines if "val/loss" in line and line.get(metric) is None), None)
        if step is not None:
            raise UserError(f"{name}: {metric} of step {step} is missing from its logs")
    if not any("log_interval" in (start.get("changed") or {}) for start in run.history):
        step = missing(run.config["log_interval"], set(steps))
        if step is not None:
            raise UserError(f"{name}: the line of step {step} is missing from its logs")
    # a run whose max_iters was raised was also evaluated at its earlier end
    lines = [line if _is_scheduled(run, line["step"]) else _without_evaluation(line) for line in run.lines]
    return replace(run, lines=lines)


def _is_scheduled(run: Run, step: int) -> bool:
    return step % run.config["eval_interval"] == 0 or step == run.steps


def _without_evaluation(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("val/")}


def load_runs(sources: Iterable[Any], load: Callable[[Any], Run] = load_run) -> tuple[list[Run], list[Unusable]]:
    """The runs that can be compared, and an error for each of the others.

    sources: folders, or other values that `load` accepts.
    """
    runs: list[Run] = []
    unusable: list[Unusable] = []
    for source in sources:
        try:
            runs.append(load(source))
        except Unusable as e:
            unusable.append(e)
    return runs, unusable


def lost_seeds(unusable: Iterable[Unusable], arms: Arms) -> dict[str, set[str]]:
    """Seeds of runs that cannot be compared, by arm, unless another run of the arm has the seed.

    An unknown seed is "unknown". A run of an unknown arm counts for every arm.
    """
    lost: dict[str, set[str]] = {}
    for e in (e for e in unusable if e.is_run):
        for arm in [e.arm] if e.arm else arms:
            if e.seed is None or e.seed not in arms.get(arm, {}):
                lost.setdefault(arm, set()).add("unknown" if e.seed is None else str(e.seed))
    return lost


def expand(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs: a folder that holds no run itself is replaced by those inside it that do."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted({path.parent for name in RUN_FILES for path in folder.glob(f"*/{name}")})
        found += inside if inside and not (folder / "config.json").exists() else [folder]
    return found


def named_after(folders: list[Path], what: str) -> Path:
    """The folder of a report on these runs: out/ with `what` and their names."""
    names = [re.sub(r"[^\w.-]+", "_", folder.resolve().name, flags=re.ASCII)[:40] for folder in folders]
    more = [f"{len(names) - 3}_more"] if len(names) > 3 else []
    return Path("out") / "_".join([what, *names[:3], *more])


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key of config.json; the default for a setting that the run's version did not have."""
    return config.get(key, KEYS[key].default if key in KEYS else None)


def effective(config: Mapping[str, Any], roles: tuple[str, ...] = COMPARED) -> dict[str, Any]:
    """The keys of these roles whose values have an effect, with their values. An unknown key has role 'computed'."""
    values = {key: value_of(config, key) for key in config.keys() | KEYS.keys() | ENVIRONMENT.keys()}
    return {
        key: value
        for key, value in values.items()
        if ROLE_OF_KEY.get(key, "computed") in roles and is_active(key, values, KEYS)
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any], roles: tuple[str, ...] = COMPARED) -> list[str]:
    """The keys of these roles in which two configs differ and whose values have an effect in both."""
    ours, theirs = effective(a, roles), effective(b, roles)
    return sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key])


def confounders(arms: Arms, a: str, b: str) -> list[str]:
    """Settings in which two arms differ, except those that define them: "key (value in a against value in b)"."""
    one, other = (next(iter(arms[name].values())).config for name in (a, b))
    defining = ARMS.get(a, {}).keys() | ARMS.get(b, {}).keys()
    found = [key for key in differing(one, other) if key not in defining and key not in ("margin", "protocol")]
    # the outcome reads the ramp, which has no effect itself where beta is off
    has_other_ramp = value_of(one, "chrono_ramp") != value_of(other, "chrono_ramp")
    found += ["chrono_ramp"] * (has_other_ramp and "chrono_ramp" not in found)
    return [f"{key} ({_short(value_of(one, key))} against {_short(value_of(other, key))})" for key in found]


def machine_difference(arms: Arms, a: str, b: str) -> str | None:
    """A warning if every run of arm a had another machine or version than every run of arm b, or None."""
    configs = [[run.config for run in arms[name].values()] for name in (a, b)]
    values = {
        key: [{json.dumps(config[key]) for config in of_an_arm if key in config} for of_an_arm in configs]
        for key, role in ROLE_OF_KEY.items()
        if role == "machine" and key not in ("git_commit", "backend")
    }
    apart = [key for key, (ours, theirs) in values.items() if ours and theirs and not ours & theirs]
    return f"all runs of '{a}' and '{b}' differ in {', '.join(apart)}, so rounding may differ" if apart else None


def group_into_arms(runs: list[Run]) -> tuple[Arms, dict[str, list[str]], list[str]]:
    """Group runs by arm and seed. Returns (arms, settings that differ with their values, reasons for runs left out).

    Within an arm, runs whose settings differ from those of most runs are left out.
    """
    arms: Arms = {}
    left_out = []
    for arm in sorted({run.arm for run in runs}, key=[*ARMS, CUSTOM].index):
        members = [run for run in runs if run.arm == arm]
        agreeing = Counter(i for run in members for i, m in enumerate(members) if not differing(run.config, m.config))
        reference = members[agreeing.most_common(1)[0][0]]
        arms[arm] = {}
        for run in members:
            other = differing(run.config, reference.config)
            if other:
                theirs, ours = (_short(value_of(r.config, other[0])) for r in (run, reference))
                left_out.append(f"{run.name}: {other[0]} is {theirs}, in {reference.name} of the same arm {ours}")
            elif run.seed in arms[arm]:
                left_out.append(f"{run.name}: seed {run.seed} of arm {arm!r} is already {arms[arm][run.seed].name}")
            else:
                arms[arm][run.seed] = run
    configs = [effective(run.config, SHOWN) for members in arms.values() for run in members.values()]
    names = sorted(set().union(*configs))
    values = {name: sorted({json.dumps(config[name]) for config in configs if name in config}) for name in names}
    return arms, {name: found for name, found in values.items() if len(found) > 1}, left_out


def pairs(arms: Arms, a: str, b: str) -> tuple[list[tuple[Run, Run]], list[str]]:
    """The pairs of runs of arms a and b with the same seed, and a reason for each pair that is left out.

    A pair is left out if its two runs differ in code or matmul precision.
    """
    good, left_out = [], []
    for seed in sorted(arms[a].keys() & arms[b].keys()):
        pair = arms[a][seed], arms[b][seed]
        mixed = [key for key in PAIR_KEYS if len(set().union(*(run.values_over_starts(key) for run in pair))) > 1]
        if mixed:
            keys = " and ".join(mixed)
            left_out.append(f"{a} - {b}, seed {seed}: the pair is left out, its {keys} differ or are not recorded")
        else:
            good.append(pair)
    return good, left_out


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
