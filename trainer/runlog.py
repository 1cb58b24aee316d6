"""The files of a run, and what it prints.

In out_dir: config.json (every setting as resolved, the environment, the history of starts, and what is missing from the
logs), metrics.jsonl (a line per logged step), decisions.jsonl (a line when a prune candidate opens or is withdrawn).
Console prints a row per logged step. Sinks (W&B, TensorBoard) get the metrics, the console's lines and alerts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronomoe import PruneDecision
from chronomoe.options import is_active
from trainer import checkpoint
from trainer.console import Console
from trainer.environment import ENVIRONMENT
from trainer.errors import UserError
from trainer.files import JsonLines, atomic_write, open_regular, parse_json, read_text, remove_partial_files
from trainer.progress import Line
from trainer.settings import Settings, keys
from trainer.sinks import Sink
from trainer.tensorboard_log import TensorBoardLog
from trainer.wandb_run import WandbRun

CONFIG, LOGS = "config.json", ("metrics.jsonl", "decisions.jsonl")
# keys of a checkpoint that RunLog reads on resume; checkpoint.is_ours reads 'random'
RECORD = ("lines", "lines_sha256", "history", "incomplete", "wandb_id", "unfinished", "random")
CONDITION = ("model", "computed", "numerics", "length", "data")  # roles of the keys that a W&B group tells apart
LISTED = 20  # experts that an alert lists


class RunLog:
    """Writes the run's files and its console lines, and passes what is logged on to the sinks.

    Args:
        settings: of the run.
        resolved: contents of config.json, except `history` and `incomplete`.
        this_start: appended to the history.
        step: where the run starts. Later lines are dropped: they were logged after the checkpoint.
        saved: on resume, record_of the checkpoint.

    Raises UserError if out_dir cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        resolved: dict[str, Any],
        this_start: dict[str, Any],
        step: int = 0,
        saved: dict[str, Any] | None = None,
    ):
        self.settings = settings
        self.out_dir = Path(settings.out_dir)
        self.sinks: list[Sink] = []
        self.console = SharedConsole(settings, step, self.sinks)
        self.wandb: WandbRun | None = None
        self.is_behind = False  # lines are waiting in memory
        self.closed = False
        config = self.out_dir / CONFIG
        wandb_id = saved.get("wandb_id") if saved else None
        self.files: dict[str, JsonLines] = {}
        logs = [self.out_dir / name for name in LOGS]
        new = [path for path in logs if not os.path.lexists(path)]
        try:
            for path in (config, *logs):
                remove_partial_files(path)  # of a process that was killed
            self._open_logs(step, saved)
            history, self.incomplete = _merged_record(config, saved) if saved else ([], [])
            damage = [f.damage for f in self.files.values() if f.damage]
            self.incomplete += [sentence for sentence in damage if sentence not in self.incomplete]
            self.history = json.loads(json.dumps([*history, this_start]))  # as config.json stores them
            resolved = resolved | {"incomplete": self.incomplete, "history": self.history}
            with atomic_write(config) as f:
                f.write(json.dumps(resolved, indent=2).encode() + b"\n")
        except OSError as e:
            for log in self.files.values():
                log.close()
            for path in new:
                path.unlink(missing_ok=True)
            raise UserError(f"cannot write to out_dir {self.out_dir}: {e.strerror}") from None
        for sentence in self.incomplete:
            self.info(f"incomplete: {sentence}")
        if settings.wandb_log:
            identity = wandb_identity(settings, resolved)
            self.wandb = WandbRun(
                self.info, self.out_dir, resumed=wandb_id is not None, config=resolved, id=wandb_id, **identity
            )
            self.sinks.append(self.wandb)
        if settings.tensorboard:
            first_step = 0 if saved is None else _last_logged(step, saved) + 1
            self.sinks.append(TensorBoardLog(self.info, self.out_dir / "tensorboard", first_step))

    def _open_logs(self, step: int, saved: dict[str, Any] | None) -> None:
        saved = {"lines": {"metrics": 0, "decisions": 0}} if saved is None else saved
        lines, sha256 = saved.get("lines", {}), saved.get("lines_sha256", {})
        last = {"metrics": _last_logged(step, saved), "decisions": step}
        for name, upto in last.items():
            path, is_metrics = self.out_dir / f"{name}.jsonl", name == "metrics"
            self.files[name] = JsonLines(path, lines.get(name), upto, sha256.get(name), one_per_step=is_metrics)

    def state(self) -> dict[str, Any]:
        """The log's part of a checkpoint: number of lines, their digests, the history, what is missing."""
        return {
            "lines": {name: f.count for name, f in self.files.items()},
            "lines_sha256": {name: f.sha256 for name, f in self.files.items()},
            "history": self.history,
            "incomplete": self.incomplete,
            "wandb_id": self.wandb.id if self.wandb else None,
        }

    def sync(self) -> None:
        """Write every line to the disk. Raises OSError."""
        for f in self.files.values():
            f.flush()
            f.sync()

    def info(self, line: str) -> None:
        """Print a line."""
        self.console.info(line)

    def advance(self) -> None:
        """Count a finished step in the progress bar."""
        self.console.advance()

    def metrics(self, values: Line) -> None:
        """Log a step's metrics by name; `values` includes `step`."""
        self._append("metrics", values)
        for sink in self.sinks:
            sink.log(values)
        self.console.row(values)

    def alert(self, title: str, text: str, step: int) -> None:
        """Print an event, and pass it on to the sinks as an alert."""
        self.info(text)
        for sink in self.sinks:
            sink.alert(title, text, step)

    def decisions(self, decisions: list[PruneDecision]) -> None:
        """Log prune candidates that opened or were withdrawn. Nothing is pruned."""
        for d in decisions:
            self._append("decisions", dataclasses.asdict(d))
            verb = "prune" if d.action == "open" else "withdraw the proposal to prune"
            phi = "none" if d.phi_slow is None else f"{d.phi_slow:.3f}"
            self.info(
                f"[DRY-RUN] step {d.step}: {verb} {d.expert_id} "
                f"(reason={d.reason}, phi_slow={phi}, tokens={d.total_tokens_seen:,})"
            )
        opened = [d for d in decisions if d.action == "open"]
        if opened:
            experts = list(dict.fromkeys(d.expert_id for d in opened))
            names = ", ".join(experts[:LISTED]) + (", ..." if len(experts) > LISTED else "")
            step = opened[-1].step
            for sink in self.sinks:
                sink.alert("Prune proposals", f"step {step}: proposed, not executed: {names}", step)

    def close(self, in_haste: bool = False) -> None:
        """Close the sinks and the files; only the first call counts. in_haste: a signal ended the run."""
        if self.closed:
            return
        self.closed = True
        self.console.close()
        if self.wandb and self.settings.wandb_artifacts and not in_haste:
            files = [self.out_dir / name for name in (checkpoint.NAME, checkpoint.BEST)]
            self.wandb.artifact("checkpoint", "model", files)
        for sink in self.sinks:
            sink.finish(in_haste)
        for f in self.files.values():
            if f.waiting:
                self.info(f"{len(f.waiting)} lines of {f.path} could not be written and are lost")
            f.close()

    def _append(self, name: str, values: dict[str, Any]) -> None:
        try:
            self.files[name].write(values)
            for f in self.files.values():
                f.flush()
        except OSError as e:
            if not self.is_behind:
                path = self.files[name].path
                self.info(f"cannot write {path}: {e.strerror}; training continues, and lines wait in memory")
            self.is_behind = True
        else:
            if self.is_behind:
                self.info("the lines that were waiting are written")
            self.is_behind = False


class NoLog:
    """A log that does nothing, for ranks other than 0."""

    def info(self, line: str) -> None: ...

    def advance(self) -> None: ...

    def metrics(self, values: Line) -> None: ...

    def alert(self, title: str, text: str, step: int) -> None: ...

    def decisions(self, decisions: list[PruneDecision]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def sync(self) -> None: ...

    def close(self, in_haste: bool = False) -> None: ...


class ConsoleLog(NoLog):
    """A log that only prints, for runs that write nothing."""

    def info(self, line: str) -> None:
        print(line)


class SharedConsole(Console):
    """A console whose lines also go to the sinks."""

    def __init__(self, settings: Settings, first_step: int, sinks: list[Sink]):
        super().__init__(settings, first_step)
        self.sinks = sinks

    def info(self, line: str) -> None:
        super().info(line)
        for sink in self.sinks:
            sink.line(line)


def wandb_identity(settings: Settings, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Names in W&B. The job type is the arm; runs that differ in seed, or in off, on and shuffled, have one group.

    resolved: contents of config.json.
    """
    s = settings
    return {
        "project": s.wandb_project,
        "name": s.wandb_run_name or Path(s.out_dir).name,
        "group": s.wandb_group or wandb_group(resolved),
        "job_type": s.arm,
        "tags": list(dict.fromkeys([*s.chrono.steps_on(), f"signal:{s.chrono.signal}", f"seed:{s.seed}", *s.own_tags])),
        "notes": s.wandb_notes or None,
    }


def wandb_group(resolved: Mapping[str, Any]) -> str:
    """A name for the condition of a run: readable parts, then a digest of all that defines it.

    The arms off, on and shuffled do not differ in it, nor do seeds. The arm `load` sets other keys too.
    resolved: settings by key, and those of ENVIRONMENT that are known.
    """
    declared = keys()
    values = {**resolved, "chrono_beta": True, "chrono_signal": "coherence"}
    roles = {name: key.role for name, key in declared.items()} | ENVIRONMENT
    condition = {
        name: value
        for name, value in values.items()
        if roles.get(name) in CONDITION and name != "dataset" and is_active(name, values, declared)
    }
    digest = hashlib.sha256(json.dumps(condition, sort_keys=True).encode()).hexdigest()[:6]
    shape = "{n_layer}x{n_embd}-e{n_exp}-k{top_k}".format(**values)
    loop = "eta{chrono_eta:g}-kmax{chrono_k_max:g}".format(**values) + "-center" * values["chrono_center"]
    return f"{Path(values['dataset']).name[:40]}-{shape}-{loop}-{digest}"


def record_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint that RunLog reads."""
    return {key: value for key, value in checkpoint.items() if key in RECORD}


def holds_a_run(out_dir: Path) -> bool:
    """Whether out_dir has a checkpoint, or logs of more than step 0: a first step can fail, of a wrong setting."""
    return checkpoint.exists(out_dir) or _has_logs(out_dir / "metrics.jsonl")


def _has_logs(metrics: Path) -> bool:
    if not os.path.isfile(metrics):  # returns False for a path that is too long; Path raises
        return False
    try:
        with open_regular(metrics) as f:
            return any(parse_json(line)["step"] != 0 for line in f)
    except (ValueError, KeyError, TypeError):  # a damaged line
        return True
    except OSError:
        return False


def check_is_own(out_dir: Path) -> None:
    """Raise UserError if out_dir has files that a run would change, and that no run has written."""
    hint = "use another --out_dir, or remove it"
    for name in (CONFIG, *LOGS, checkpoint.NAME, checkpoint.PREVIOUS, checkpoint.BEST):
        path = out_dir / name
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a regular file: {hint}")
    path = out_dir / CONFIG
    config = _read_config(path)
    is_own = config.keys() >= {"out_dir", "init_from"}
    has_checkpoint = checkpoint.exists(out_dir)  # then config.json can be damaged or deleted
    if not is_own and os.path.lexists(path) and (config or not has_checkpoint):
        raise UserError(f"{path} is not of a run: {hint}")
    others = [name for name in LOGS if _has_content(out_dir / name)]
    if others and not is_own and not has_checkpoint:
        raise UserError(f"{out_dir / others[0]} is there without the {CONFIG} of a run: {hint}")


def is_complete(out_dir: Path, most: int) -> bool:
    """Whether the logs are those of a run that has saved: more than `most` evaluations after step 0, or the last step.

    A run that was killed while it saved the last step has not. Raises UserError if the logs cannot be read.
    """
    count, last, length = 0, 0, _read_config(out_dir / CONFIG).get("max_iters")
    try:
        with open_regular(out_dir / "metrics.jsonl") as f:
            for line in f:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    values = parse_json(line)
                    last = max(last, values["step"])
                    count += values["step"] > 0 and values.get("val/loss") is not None
    except OSError as e:
        if not _is_absent(e):
            raise UserError(f"cannot read {out_dir / 'metrics.jsonl'}: {e.strerror}") from None
    is_done = isinstance(length, (int, float)) and 0 < length <= last
    return count > most or (is_done and not checkpoint.partial_files(out_dir))


def _has_content(path: Path) -> bool:
    # os.path returns False for a path that is too long; Path raises
    return os.path.isfile(path) and os.path.getsize(path) > 0


def history_in(path: Path) -> list[Any]:
    """The history in a config.json; empty if it cannot be read."""
    return _list_in(_read_config(path), "history")


def _merged_record(config_path: Path, saved: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """(history, incomplete) of a resumed run, from its checkpoint and its config.json.

    config.json also has the starts after the checkpoint, but can be damaged or deleted.
    """
    config = _read_config(config_path)
    incomplete = [*saved.get("incomplete", [])]
    incomplete += [sentence for sentence in _list_in(config, "incomplete") if sentence not in incomplete]
    written, kept = _list_in(config, "history"), saved.get("history", [])
    if not kept and not written and checkpoint.is_ours(saved):
        incomplete.append("config.json: the history of the run's starts is lost")
    return (written if written[: len(kept)] == kept else kept), incomplete


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in a config.json; empty if it is absent or damaged. Raises UserError if it cannot be read."""
    try:
        config = parse_json(read_text(path))
    except OSError as e:
        if not _is_absent(e):
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        return {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _is_absent(e: OSError) -> bool:
    return e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def _last_logged(step: int, saved: dict[str, Any]) -> int:
    """The last step that has a line, of a run at this step: a step whose evaluation was interrupted has none yet."""
    return step - 1 if saved.get("unfinished") else step


def _list_in(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    return value if isinstance(value, list) else []
