"""What a run leaves behind and what a person sees of it.

In out_dir: config.json (every setting as resolved, what the run ran on, and a history of its starts), metrics.jsonl
(a line a logged step), decisions.jsonl (a line when a prune candidate opens or is withdrawn). On the screen: a line a
logged step.
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
from typing import Any, ClassVar

from tqdm import tqdm

from chronomoe import PruneDecision
from trainer import checkpoint
from trainer.errors import UserError
from trainer.files import JsonLines, parse_json, read_text, remove_leftovers, whole_file
from trainer.settings import Settings
from trainer.wandb_run import WandbRun

tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system's, which a killed process leaves behind


class RunLog:
    """The run's files, its lines on the screen and its W&B run.

    Args:
        settings: the run's.
        resolved: what config.json says, every setting and what the run runs on.
        started: of this start, for config.json's history; those of earlier starts stay.
        step: that the run starts from; later lines, of a run that went on past its checkpoint, are dropped.
        lines: how many lines of metrics.jsonl and decisions.jsonl stay; None: those of steps up to `step`.
        wandb_id: of the W&B run to go on with.
        resumed: config.json's history goes on.

    Raises UserError if out_dir cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        resolved: dict[str, Any],
        started: dict[str, Any],
        step: int = 0,
        lines: dict[str, int] | None = None,
        wandb_id: str | None = None,
        resumed: bool = False,
    ):
        self.settings = settings
        self.out_dir = Path(settings.out_dir)
        self.start = step
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self.wandb: WandbRun | None = None
        self.behind = False  # lines wait in memory
        self.closed = False
        try:
            for name in ("config.json", "metrics.jsonl", "decisions.jsonl"):
                remove_leftovers(self.out_dir / name)  # of a start that was killed
            self.files = {
                name: JsonLines(self.out_dir / f"{name}.jsonl", lines[name] if lines else None, step)
                for name in ("metrics", "decisions")
            }
            history = history_in(self.out_dir / "config.json") if resumed else []
            with whole_file(self.out_dir / "config.json") as f:
                f.write(json.dumps(resolved | {"history": [*history, started]}, indent=2).encode() + b"\n")
        except OSError as e:
            raise UserError(f"cannot write to out_dir {self.out_dir}: {e.strerror}") from None
        if settings.wandb_log:
            identity = wandb_identity(settings)
            self.wandb = WandbRun(
                self.say, self.out_dir, resumed=wandb_id is not None, config=resolved, id=wandb_id, **identity
            )
        if sys.stdout.isatty():
            self.bar = tqdm(total=settings.max_iters, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    @property
    def lines(self) -> dict[str, int]:
        """Lines written so far, by file."""
        return {name: f.count for name, f in self.files.items()}

    def sync(self) -> None:
        """Until the disk has every line. Raises OSError if it cannot."""
        for f in self.files.values():
            f.flush()
            f.sync()

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb else None

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
    """A RunLog's face on the ranks that do not log."""

    lines: ClassVar = {}
    wandb_id = None

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


def holds_a_run(out_dir: Path) -> bool:
    metrics = out_dir / "metrics.jsonl"
    # os.path's functions say False where a path is too long or hidden; Path's raise
    return (os.path.isfile(metrics) and os.path.getsize(metrics) > 0) or checkpoint.exists(out_dir)


def history_in(path: Path) -> list[Any]:
    """The history in a config.json; empty where there is none that can be read."""
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError):
        return []
    history = config.get("history") if isinstance(config, dict) else None
    return history if isinstance(history, list) else []
