"""Weights & Biases. It never prompts, never ends a training run, and delays its start by a few seconds at most."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from chronomoe.metrics import EXPERT_VALUES, by_expert, place_of, summary
from trainer.errors import first_line
from trainer.progress import Line
from trainer.sinks import Calls

Mode = Literal["online", "offline", "disabled"]

REACH_TIMEOUT = 3.0  # seconds to reach the server
START_TIMEOUT = 10.0  # seconds for a server that is reached to start the run
FINISH_TIMEOUT = 120.0  # seconds to upload what is left at the end
HASTY_TIMEOUT = 5.0  # the same after a signal
HIDDEN = ("step", "tokens", "time/step_ms")  # metrics without a chart, besides those of a layer or an expert


class WandbRun:
    """A Sink that is one W&B run.

    Args:
        info: prints a line.
        out_dir: parent of W&B's folder.
        resumed: the run continues one with the same id.
        identity: wandb.init's project, name, group, job_type, tags, notes, config and id.
    """

    def __init__(self, info: Callable[[str], None], out_dir: Path, resumed: bool = False, **identity: Any):
        self.info = info
        self.calls = Calls("W&B", info)
        self.run = None
        self.id: str | None = identity.get("id")
        self.defined: set[str] = set()  # names of metrics
        try:
            import wandb

            logging.raiseExceptions = False  # on a full disk W&B's logger would print a traceback for each line
            mode, why = _mode(wandb)
            if mode == "disabled":
                info(f"W&B: disabled ({why})")
                return
            settings = wandb.Settings(
                silent=True, console="off", init_timeout=START_TIMEOUT, finish_timeout=FINISH_TIMEOUT
            )
            try:
                run = wandb.init(mode=mode, dir=out_dir, resume="allow", settings=settings, **identity)
            except Exception as e:
                if mode == "offline":
                    raise
                mode, why = "offline", f"{type(e).__name__}: {first_line(e)}"
                run = wandb.init(mode=mode, dir=out_dir, settings=settings, **identity)
        except Exception as e:
            self.calls.fail("start", e)
            return
        self.run = run
        self.id = run.id
        self.folder = run.settings.sync_dir
        if mode == "offline":
            # a resumed run has one folder per start, all with its id
            folders = sorted(str(path) for path in Path(out_dir).glob(f"wandb/offline-run-*-{self.id}*"))
            several = resumed and len(folders) > 1
            info(f"W&B: offline ({why}); to upload later: wandb sync {' '.join(folders) if several else self.folder}")
        else:
            info(f"W&B: {run.url}")
        self.calls.start()

    def log(self, values: Line) -> None:
        self.attempt("log", lambda wandb, run: self._log(wandb, run, values))

    def line(self, text: str) -> None:
        self.attempt("log", lambda wandb, run: run.write_logs(text))

    def alert(self, title: str, text: str, step: int) -> None:
        self.attempt("alert", lambda wandb, run: run.alert(title, text, level="WARN"))

    def artifact(self, name: str, kind: str, paths: list[Path]) -> None:
        """Upload those of these files that exist as one artifact. name: without the run's id. kind: its type in W&B."""

        def upload(wandb: Any, run: Any) -> None:
            artifact = wandb.Artifact(f"{name}-{run.id}", type=kind)
            for path in paths:
                if path.exists():
                    artifact.add_file(str(path), policy="immutable")  # without a copy
            run.log_artifact(artifact)

        self.attempt("upload", upload)

    def attempt(self, doing: str, action: Callable[[Any, Any], Any]) -> None:
        """Call action(wandb, run) in the thread, if W&B still works. doing: a verb for the message if it fails."""
        run = self.run
        if run is not None:
            import wandb

            self.calls.put(doing, lambda: action(wandb, run))

    def finish(self, in_haste: bool = False) -> None:
        run = self.run
        if run is None or not self.calls.is_open:
            return
        hint = f"; to upload: wandb sync {self.folder}"
        self.calls.finish(run.finish, HASTY_TIMEOUT if in_haste else FINISH_TIMEOUT, hint)
        lost = _lost(Path(self.folder))
        if lost and not self.calls.failed:
            self.info(f"W&B: {self.folder} is incomplete ({lost})")

    def _log(self, wandb: Any, run: Any, values: Line) -> None:
        content: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        content |= summary(values)
        for name in [name for name in content if name not in self.defined]:  # in a pattern, * does not match a slash
            self._define(run, name)
        if "val/loss" in values and any(by_expert(values, metric) for metric in EXPERT_VALUES):
            content["experts"] = _expert_table(wandb, values)
        run.log(content, step=int(content["step"]))

    def _define(self, run: Any, name: str) -> None:
        options: dict[str, Any] = {} if name == "step" else {"step_metric": "step"}
        if place_of(name) is not None:
            options |= {"hidden": True, "summary": "none"}
        elif name in HIDDEN:
            options |= {"hidden": True}
        elif name == "val/loss":
            options |= {"summary": "min,last"}
        run.define_metric(name, **options)
        self.defined.add(name)


def _expert_table(wandb: Any, values: Line) -> Any:
    """One row per expert: its block, its index, and the EXPERT_VALUES that are measured."""
    found = {metric: by_expert(values, metric) for metric in EXPERT_VALUES}
    found = {metric: cells for metric, cells in found.items() if cells}
    places = next(iter(found.values()))
    rows = [[block, e, *(cells[block, e] for cells in found.values())] for block, e in places]
    return wandb.Table(columns=["block", "expert", *found], data=rows)


def _lost(folder: Path) -> str:
    """Why W&B's process could not write the run's file, from its log; empty if it could."""
    try:
        with (folder / "logs" / "debug-internal.log").open(errors="replace") as f:
            found = next((line for line in f if "failed to save record" in line), "")
    except OSError:
        return ""
    return found.rsplit(": ", 1)[-1].strip('"}\n')


def _mode(wandb: Any) -> tuple[Mode, str]:
    """('online', 'offline' or 'disabled', reason), without prompting the user."""
    import requests

    chosen = os.environ.get("WANDB_MODE")
    for mode in ("offline", "disabled"):
        if chosen == mode:
            return mode, f"WANDB_MODE={mode}"
    settings = wandb.setup().settings
    url = str(settings.base_url)
    if not (
        settings.api_key
        or os.environ.get("WANDB_API_KEY")
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        or requests.utils.get_netrc_auth(url)
    ):
        return "offline", "not logged in; `wandb login` logs in"
    try:
        requests.head(url, timeout=REACH_TIMEOUT)
    except requests.RequestException:
        return "offline", f"{url} cannot be reached"
    return "online", ""
