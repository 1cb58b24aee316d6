"""Weights & Biases. It never prompts, never ends a training run, and delays its start by a few seconds at most."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.errors import first_line, skip_exit_handlers

Mode = Literal["online", "offline", "disabled"]

REACH_TIMEOUT = 3.0  # seconds to reach the server
START_TIMEOUT = 10.0  # seconds for a server that is reached to start the run
FINISH_TIMEOUT = 120.0  # seconds to upload what is left at the end
HASTY_TIMEOUT = 5.0  # the same after a signal
MAX_QUEUED = 1000  # calls


class WandbRun:
    """One W&B run. After a failure it prints one line and does nothing from then on.

    A thread makes the calls, so a slow or hanging W&B does not hold up training.

    Args:
        info: prints a line.
        out_dir: parent of W&B's folder.
        resumed: the run continues one with the same id.
        identity: wandb.init's project, name, group, job_type, tags, config and id.
    """

    def __init__(self, info: Callable[[str], None], out_dir: Path, resumed: bool = False, **identity: Any):
        self.info = info
        self.run = None
        self.failed = False
        self.id: str | None = identity.get("id")
        self.work: queue.SimpleQueue[tuple[str, Callable[[Any, Any], Any]] | None] = queue.SimpleQueue()
        try:
            import wandb

            mode, why = _mode(wandb)
            if mode == "disabled":
                info(f"W&B: disabled ({why})")
                return
            settings = wandb.Settings(
                silent=True, console="off", init_timeout=START_TIMEOUT, finish_timeout=FINISH_TIMEOUT
            )
            try:
                self.run = wandb.init(mode=mode, dir=out_dir, resume="allow", settings=settings, **identity)
            except Exception as e:
                if mode == "offline":
                    raise
                mode, why = "offline", f"{type(e).__name__}: {first_line(e)}"
                self.run = wandb.init(mode=mode, dir=out_dir, settings=settings, **identity)
            self.run.define_metric("*", step_metric="step")
        except Exception as e:
            self._fail("start", e)
            return
        self.id = self.run.id
        self.folder = self.run.settings.sync_dir
        if mode == "offline":
            # a resumed run has one folder per start, all with its id
            folders = sorted(str(path) for path in Path(out_dir).glob(f"wandb/offline-run-*-{self.id}*"))
            several = resumed and len(folders) > 1
            info(f"W&B: offline ({why}); to upload later: wandb sync {' '.join(folders) if several else self.folder}")
        else:
            info(f"W&B: {self.run.url}")
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, values: dict[str, float | None]) -> None:
        """Log one step's values, which include `step`."""
        numbers = {k: v for k, v in values.items() if v is not None}
        self.attempt("log", lambda wandb, run: run.log(numbers, step=int(numbers["step"])))

    def attempt(self, doing: str, action: Callable[[Any, Any], Any]) -> None:
        """Call action(wandb, run) in the thread, if W&B still works. doing: a verb for the message if it fails."""
        if self.run is None:
            return
        self.work.put((doing, action))
        if self.work.qsize() > MAX_QUEUED:
            self._fail("keep up", TimeoutError(f"{MAX_QUEUED} calls are waiting"))

    def finish(self, in_haste: bool = False) -> None:
        """Finish the run after the queued calls. in_haste: a signal ended the program."""
        if self.run is None:
            return
        self.attempt("finish", lambda wandb, run: run.finish())
        self.work.put(None)
        seconds = HASTY_TIMEOUT if in_haste else FINISH_TIMEOUT
        self.thread.join(seconds)
        if self.thread.is_alive() and self.run is not None:
            self._fail("finish", TimeoutError(f"not done after {seconds:g} s; to upload: wandb sync {self.folder}"))
        lost = _lost(Path(self.folder))
        if lost:
            self.info(f"W&B: {self.folder} is incomplete ({lost}); metrics.jsonl is complete")

    def _work(self) -> None:
        import wandb

        while (work := self.work.get()) is not None and self.run is not None:
            doing, action = work
            try:
                action(wandb, self.run)
            except Exception as e:
                self._fail(doing, e)

    def _fail(self, doing: str, e: Exception) -> None:
        if self.run is not None:
            skip_exit_handlers()  # W&B's would hang or print a traceback
        self.run = None  # nothing is queued from here on
        if not self.failed:
            self.failed = True
            self.info(f"W&B: could not {doing} ({type(e).__name__}: {first_line(e)}); continuing without it")


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
