"""Runs and studies for the tests of the comparison, in memory and on disk."""

import json
import math
from pathlib import Path

import numpy as np

from comparison.runs import Run, checked, group_into_arms
from trainer.arms import ARMS
from trainer.settings import Settings

START = {"step": 0, "changed": {}, "code_sha256": "c", "matmul_precision": "highest"}
BASE = Settings().flat() | {
    **dict(dataset="stdlib", data_sha256={"train.bin": "a"}, weights_sha256=None, weights_from=None, incomplete=[]),
    **dict(max_iters=100, eval_interval=10, log_interval=10, n_exp=4, chrono_router=True, chrono_coherence=True),
    **dict(margin=0.02, threads=2, ranks=1, code_sha256="c", history=[START], vocab_size=257),
}


def make_run(seed, shift=0.0, arm="off", metrics=None, **changes):
    """A run whose loss falls to 2 plus an offset of the seed; shift is added in the last quarter. Not `checked`."""
    offset = shift + np.random.default_rng(seed).normal(0, 0.05)
    metrics = metrics or {"routing/L0/load_cv": 0.5, "routing/L0/neff": 7.0, "coherence/L0/layer": 0.6 + shift}
    texts = [Path(entry.partition("@")[0]).name for entry in str(changes.get("data_schedule") or "").split()]
    lines = []
    for step in range(0, 101, 10):
        loss = 2 + math.exp(-step / 20) + offset * min(step / 75, 1)
        losses = {"val/loss": loss} | {f"val/{text}/loss": loss for text in texts}
        lines.append({"step": step} | losses | (metrics if step else {}))
    return Run(f"{arm}{seed}", BASE | {"seed": seed, "arm": arm} | ARMS.get(arm, {}) | changes, lines, [])


def make_study(effect, noise=0.003, seeds=8, placebo=0.0, **changes):
    """Runs of `off`, `on` and `shuffled` by seed. changes: settings of all arms, or of one if the key is its name."""
    of_all, runs = {key: value for key, value in changes.items() if key not in ARMS}, []
    for seed in range(seeds):
        draws = np.random.default_rng(100 + seed).normal(0, noise, 2)
        for arm, shift in {"off": 0.0, "on": effect + draws[0], "shuffled": placebo + draws[1]}.items():
            runs.append(make_run(seed, shift, arm, **of_all | changes.get(arm, {})))
    return runs


def arms_of(runs):
    """Checked runs by arm and seed; none may be left out."""
    arms, _, left_out = group_into_arms([checked(run) for run in runs])
    assert not left_out
    return arms


def write(folder, run):
    """Write the files of a run. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.lines))
    return folder


def change_lines(folder, change):
    """Replace the lines of metrics.jsonl by change(lines)."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


def change_config(folder, **changes):
    """Change keys of config.json; `...` removes a key. Returns the folder."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder
