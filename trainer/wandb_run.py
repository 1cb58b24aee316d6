"""Weights & Biases, as a guest: it never asks, never ends a training run, and holds up its start by seconds at most."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import first_line, leave_without_goodbyes

REACH_TIMEOUT = 3.0  # seconds to reach the server
START_TIMEOUT = 10.0  # seconds for a server that is reached to start the run
FINISH_TIMEOUT = 120.0  # seconds to upload what is left at the end
MOST_WAITING = 1000  # calls
HASTY_TIMEOUT = 5.0  # the same where a signal ends the run


class WandbRun:
    """One W&B run; after a failure it says so once and is silent from then on.

    What is logged goes through a thread of its own, so W&B may be slow or hang and training goes on.

    Args:
        say: takes a line for the user.
        out_dir: W&B makes its folder in it.
        resumed: the run goes on with an id that an earlier start had.
        identity: wandb.init's project, name, group, job_type, tags, config and id.
    """

    def __init__(self, say: Callable[[str], None], out_dir: Path, resumed: bool = False, **identity: Any):
        self.say = say
        self.run = None
        self.failed = False
        self.id: str | None = identity.get("id")
        self.work: queue.SimpleQueue[tuple[str, Callable[[Any, Any], Any]] | None] = queue.SimpleQueue()
        try:
            import wandb

            mode, why = _mode(wandb)
            if mode == "disabled":
                say(f"W&B: disabled ({why})")
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
            # a resumed run leaves a folder for each start, all with its id
            folders = sorted(str(path) for path in Path(out_dir).glob(f"wandb/offline-run-*-{self.id}*"))
            several = resumed and len(folders) > 1
            say(f"W&B: offline ({why}); to upload later: wandb sync {' '.join(folders) if several else self.folder}")
        else:
            say(f"W&B: {self.run.url}")
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, values: dict[str, float | None]) -> None:
        """One step's values, which hold `step`."""
        numbers = {k: v for k, v in values.items() if v is not None}
        self.attempt("log", lambda wandb, run: run.log(numbers, step=int(values["step"])))

    def attempt(self, doing: str, action: Callable[[Any, Any], Any]) -> None:
        """action(wandb, run) in W&B's thread, if W&B still works; its failure is said."""
        if self.run is None:
            return
        self.work.put((doing, action))
        if self.work.qsize() > MOST_WAITING:
            self._fail("keep up", TimeoutError(f"{MOST_WAITING} calls are waiting"))

    def finish(self, in_haste: bool = False) -> None:
        """End the run, after what was logged. in_haste: a signal ends the program."""
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
            self.say(f"W&B: {self.folder} is not whole ({lost}); metrics.jsonl is")

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
            leave_without_goodbyes()  # W&B's own would wait for what does not answer, or print a traceback
        self.run = None  # from here on nothing is put in the queue
        if not self.failed:
            self.failed = True
            self.say(f"W&B: could not {doing} ({type(e).__name__}: {first_line(e)}); going on without it")


def _lost(folder: Path) -> str:
    """Why W&B's process, which keeps that to itself, could not write the run's file; empty if it could."""
    try:
        with (folder / "logs" / "debug-internal.log").open(errors="replace") as f:
            found = next((line for line in f if "failed to save record" in line), "")
    except OSError:
        return ""
    return found.rsplit(": ", 1)[-1].strip('"}\n')


def _mode(wandb: Any) -> tuple[str, str]:
    """('online', 'offline' or 'disabled', why), found out without asking the user."""
    import requests

    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("offline", "disabled"):
        return chosen, f"WANDB_MODE={chosen}"
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
