"""What a run leaves behind and what a person sees of it.

In out_dir: config.json (every setting as resolved, what the run ran on, a history of its starts, and what is missing
from its logs), metrics.jsonl (a line per logged step), decisions.jsonl (a line when a prune candidate opens or is
withdrawn). On the screen: a line per logged step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chronomoe import PruneDecision
from trainer import checkpoint
from trainer.errors import UserError
from trainer.files import JsonLines, parse_json, read_text, remove_leftovers, whole_file
from trainer.settings import Settings
from trainer.wandb_run import WandbRun

tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system's, which a killed process leaves behind


# Keys of a checkpoint that RunLog reads on resume; 'random' says that this program wrote it.
RECORD = ("lines", "lines_sha256", "history", "incomplete", "wandb_id", "unfinished", "random")


class RunLog:
    """The run's files, its lines on the screen and its W&B run.

    Args:
        settings: the run's.
        resolved: the keys of config.json, except `history` and `incomplete`.
        started: this start, for the history; earlier starts are kept.
        step: that the run starts from; later lines, of a run that went on past its checkpoint, are dropped.
        saved: on resume, record_of the checkpoint.

    Raises UserError if out_dir cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        resolved: dict[str, Any],
        started: dict[str, Any],
        step: int = 0,
        saved: dict[str, Any] | None = None,
    ):
        self.settings = settings
        self.out_dir = Path(settings.out_dir)
        self.start = step
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self.wandb: WandbRun | None = None
        self.behind = False  # lines wait in memory
        self.closed = False
        config = self.out_dir / "config.json"
        wandb_id = saved.get("wandb_id") if saved else None
        try:
            for name in ("config.json", "metrics.jsonl", "decisions.jsonl"):
                remove_leftovers(self.out_dir / name)  # of a start that was killed
            self.files = self._open_logs(step, saved)
            history, self.incomplete = _record_of(config, saved) if saved else ([], [])
            damage = [f.damage for f in self.files.values() if f.damage]
            self.incomplete += [sentence for sentence in damage if sentence not in self.incomplete]
            self.history = json.loads(json.dumps([*history, started]))  # plain values, as config.json gives them back
            resolved = resolved | {"incomplete": self.incomplete, "history": self.history}
            with whole_file(config) as f:
                f.write(json.dumps(resolved, indent=2).encode() + b"\n")
        except OSError as e:
            raise UserError(f"cannot write to out_dir {self.out_dir}: {e.strerror}") from None
        for sentence in self.incomplete:
            self.say(f"incomplete: {sentence}")
        if settings.wandb_log:
            identity = wandb_identity(settings)
            self.wandb = WandbRun(
                self.say, self.out_dir, resumed=wandb_id is not None, config=resolved, id=wandb_id, **identity
            )
        if sys.stdout.isatty():
            self.bar = tqdm(total=settings.max_iters, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def _open_logs(self, step: int, saved: dict[str, Any] | None) -> dict[str, JsonLines]:
        saved = {"lines": {"metrics": 0, "decisions": 0}} if saved is None else saved
        lines, sha256 = _values_in(saved, "lines", int), _values_in(saved, "lines_sha256", str)
        # a step whose evaluation was cut short has no line yet
        last = {"metrics": step - 1 if saved.get("unfinished") else step, "decisions": step}
        return {
            name: JsonLines(
                self.out_dir / f"{name}.jsonl", lines.get(name), upto, sha256.get(name), one_per_step=name == "metrics"
            )
            for name, upto in last.items()
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the logs: lines written so far, their digests, the history, what is missing."""
        return {
            "lines": {name: f.count for name, f in self.files.items()},
            "lines_sha256": {name: f.sha256 for name, f in self.files.items()},
            "history": self.history,
            "incomplete": self.incomplete,
            "wandb_id": self.wandb.id if self.wandb else None,
        }

    def sync(self) -> None:
        """Until the disk has every line. Raises OSError if it cannot."""
        for f in self.files.values():
            f.flush()
            f.sync()

    def say(self, line: str) -> None:
        """A line for the person."""
        with contextlib.suppress(OSError):  # a terminal that is gone, a log on a full disk: no reason to stop
            if self.bar is not None:
                tqdm.write(line, file=sys.stdout)
            else:
                sys.stdout.write(f"{line}\n")  # in one piece: W&B's and the checkpoint's threads speak too
                sys.stdout.flush()

    def tick(self) -> None:
        """One step is done."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.update()

    def write(self, values: dict[str, float | None]) -> None:
        """A logged step: `values` holds `step`, and whatever of the metric names there is to tell."""
        self._append("metrics", values)
        if self.wandb:
            self.wandb.log(values)
        self.say(self._summary(values))

    def decide(self, decisions: list[PruneDecision]) -> None:
        """Prune proposals that opened or were withdrawn; none is executed."""
        for d in decisions:
            self._append("decisions", dataclasses.asdict(d))
            verb = "prune" if d.action == "open" else "withdraw the proposal to prune"
            phi = "none" if d.phi_slow is None else f"{d.phi_slow:.3f}"
            self.say(
                f"[DRY-RUN] step {d.step}: {verb} {d.expert_id} "
                f"(reason={d.reason}, phi_slow={phi}, tokens={d.total_tokens_seen:,})"
            )

    def close(self, caught: list[int] | None = None) -> None:
        """End the run's W&B run and files, once. caught: holds a signal if one asked for the end."""
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb:
            self.wandb.finish(in_haste=bool(caught))
        for f in self.files.values():
            if f.waiting:
                self.say(f"{len(f.waiting)} lines of {f.path} could not be written and are lost")
            f.close()

    def _append(self, name: str, values: dict[str, Any]) -> None:
        try:
            self.files[name].write(values)
            for f in self.files.values():
                f.flush()
        except OSError as e:
            if not self.behind:
                path = self.files[name].path
                self.say(f"cannot write {path}: {e.strerror}; training goes on, its lines wait in memory")
            self.behind = True
        else:
            if self.behind:
                self.say("the lines that waited are written")
            self.behind = False

    def _summary(self, v: dict[str, float | None]) -> str:
        parts = [f"step {v['step']:>{len(str(self.settings.max_iters))}}"]
        if "train/loss" in v:
            parts.append(f"loss {v['train/loss']:.4f}")
        if "val/loss" in v:
            parts.append(f"val {v['val/loss']:.4f}")
        if "time/tokens_per_s" in v:
            parts += [f"{v['time/tokens_per_s']:,.0f} tok/s", f"left {self._time_left(v['step'])}"]
        chrono = self.settings.chrono
        if any(name.startswith("beta/") for name in v):
            parts.append(f"beta {_range(v, 'beta/', '/min', '/max')}")
            parts.append(f"JS {_worst(v, '/js', max):.1e}")
            parts.append(f"flip {_worst(v, '/flip', max):.3f}")
        if chrono.bridge and any(name.endswith("/relevance") for name in v):
            parts.append(f"r {_worst(v, '/relevance', min):.2f}")
        if chrono.coherence and any(name.startswith("coherence/") for name in v):
            parts.append(f"phi {_range(v, 'coherence/', '/phi_slow_min', '/phi_slow_max')}")
        if v.get("lifecycle/candidates"):
            parts.append(f"candidates {v['lifecycle/candidates']:.0f}")
        return " | ".join(parts)

    def _time_left(self, step: float) -> str:
        per_step = (time.perf_counter() - self.started) / max(step - self.start, 1)
        return tqdm.format_interval(per_step * (self.settings.max_iters - step))


class NoLog:
    """RunLog that does nothing, for ranks other than 0."""

    def say(self, line: str) -> None: ...

    def tick(self) -> None: ...

    def write(self, values: dict[str, float | None]) -> None: ...

    def decide(self, decisions: list[PruneDecision]) -> None: ...

    def sync(self) -> None: ...

    def close(self, caught: list[int] | None = None) -> None: ...


def _worst(values: dict[str, float | None], ending: str, pick: Any) -> float:
    return pick([x for name, x in values.items() if name.endswith(ending) and x is not None], default=float("nan"))


def _range(values: dict[str, float | None], start: str, low: str, high: str) -> str:
    own = {name: x for name, x in values.items() if name.startswith(start)}
    return f"{_worst(own, low, min):+.3f}..{_worst(own, high, max):+.3f}"


def wandb_identity(settings: Settings) -> dict[str, Any]:
    """Names under which runs with beta on and off overlay: same group, other job_type."""
    s = settings
    shape = f"{s.n_layer}x{s.n_embd}-e{s.n_exp}-k{s.top_k}"
    return {
        "project": s.wandb_project,
        "name": s.wandb_run_name or Path(s.out_dir).name,
        "group": f"{Path(s.dataset).name}-{shape}",
        "job_type": "beta_on" if s.chrono.beta else "beta_off",
        "tags": [*s.chrono.steps_on(), f"signal:{s.chrono.signal}", f"seed:{s.seed}"],
    }


def record_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What RunLog reads of a checkpoint."""
    return {key: value for key, value in checkpoint.items() if key in RECORD}


def holds_a_run(out_dir: Path) -> bool:
    metrics = out_dir / "metrics.jsonl"
    # os.path's functions say False where a path is too long or hidden; Path's raise
    return (os.path.isfile(metrics) and os.path.getsize(metrics) > 0) or checkpoint.exists(out_dir)


def evaluations_in(out_dir: Path) -> int:
    """Evaluations after step 0 in the readable lines of metrics.jsonl."""
    count = 0
    with contextlib.suppress(OSError), (out_dir / "metrics.jsonl").open("rb") as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                values = parse_json(line)
                count += values["step"] > 0 and values.get("val/loss") is not None
    return count


def history_in(path: Path) -> list[Any]:
    """The history in a config.json; empty where there is none that can be read."""
    return _list_in(_read_config(path), "history")


def _record_of(config_path: Path, saved: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """(history, incomplete) of a run that is resumed, from its checkpoint and its config.json.

    config.json has the starts after the checkpoint too, but can be damaged or deleted.
    """
    config = _read_config(config_path)
    incomplete = [*_list_in(saved, "incomplete")]
    incomplete += [sentence for sentence in _list_in(config, "incomplete") if sentence not in incomplete]
    written, kept = _list_in(config, "history"), _list_in(saved, "history")
    if not kept and not written and checkpoint.is_ours(saved):
        incomplete.append("config.json: the history of the run's starts is lost")
    return (written if written[: len(kept)] == kept else kept), incomplete


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _values_in(record: dict[str, Any], key: str, kind: type) -> dict[str, Any]:
    """The values of that kind in a dict in the record; what is damaged counts as missing."""
    found = record.get(key)
    return {k: v for k, v in found.items() if isinstance(v, kind)} if isinstance(found, dict) else {}


def _list_in(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    return value if isinstance(value, list) else []
