"""Weights & Biases, as a guest: it never asks, never ends a training run, and holds up its start by seconds at most."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import first_line

REACH_TIMEOUT = 3.0  # seconds to reach the server
START_TIMEOUT = 10.0  # seconds for a server that is reached to start the run


class WandbRun:
    """One W&B run; after a failure it says so once and is silent from then on.

    say: takes a line for the user.
    """

    def __init__(self, say: Callable[[str], None], out_dir: Path, **identity: Any):
        """identity: wandb.init's project, name, group, job_type, tags, config and id."""
        self.say = say
        self.run = None
        self.id: str | None = identity.get("id")
        try:
            import wandb

            mode, why = _mode(wandb)
            if mode == "disabled":
                say(f"W&B: disabled ({why})")
                return
            settings = wandb.Settings(silent=True, console="off", init_timeout=START_TIMEOUT)
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
        if mode == "offline":
            say(f"W&B: offline ({why}); to upload later: wandb sync {self.run.settings.sync_dir}")
        else:
            say(f"W&B: {self.run.url}")

    def log(self, values: dict[str, float | None]) -> None:
        """One step's values, which hold `step`."""
        numbers = {k: v for k, v in values.items() if v is not None}
        self.attempt("log", lambda wandb, run: run.log(numbers, step=int(values["step"])))

    def finish(self) -> None:
        self.attempt("finish", lambda wandb, run: run.finish())

    def attempt(self, doing: str, action: Callable[[Any, Any], Any]) -> None:
        """action(wandb, run), if W&B still works; its failure is said."""
        if self.run is None:
            return
        import wandb

        try:
            action(wandb, self.run)
        except Exception as e:
            self._fail(doing, e)

    def _fail(self, doing: str, e: Exception) -> None:
        self.run = None
        self.say(f"W&B: could not {doing} ({type(e).__name__}: {first_line(e)}); going on without it")


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
