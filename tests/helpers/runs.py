"""Tiny runs of train.py, and functions that read and compare their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.errors import UserError

ROOT = Path(__file__).parents[2]
NANOMOE = ROOT / "tests" / "golden" / "nanomoe_ckpt.pt"  # a checkpoint of nanoMoE at step 10
STEPS = 6
VOCAB = 61
TINY = dict(
    **dict(n_layer=3, n_head=2, n_embd=16, n_exp=4, block_size=16, batch_size=4, gradient_accumulation_steps=2),
    **dict(max_iters=STEPS, lr_decay_iters=STEPS, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3),
    **dict(eval_interval=3, eval_iters=2, log_interval=1, device="cpu", wandb_log=False),
)
SHAPE = ("n_layer", "n_head", "n_embd", "n_exp", "block_size")  # settings of TINY that a checkpoint fixes
ALL_ON = {f"chrono_{step}": True for step in ("router", "coherence", "beta", "bridge", "lifecycle")}
NOISY = dict(dropout=0.2, use_noisy_top_k=True)
# every expert is proposed for pruning after step 1
FULL = ALL_ON | NOISY | dict(chrono_unused_after=1, chrono_unused_tokens=10**9, chrono_starving_phi=-1)
LONG = dict(max_iters=100_000, eval_interval=100_000)


def arguments(settings: dict) -> list[str]:
    """The command line of these settings."""
    return [f"--{key}={value}" for key, value in settings.items()]


def write_dataset(folder, vocab_size, seed=3):
    """A dataset of uniformly random tokens."""
    rng, sha256 = np.random.default_rng(seed), {}
    folder.mkdir()
    for split in ("train", "val"):
        content = rng.integers(0, vocab_size, 3000).astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        sha256[f"{split}.bin"] = hashlib.sha256(content).hexdigest()
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "sha256": sha256}))
    return folder


def write_skewed_dataset(folder):
    """A dataset that uses 8 of VOCAB tokens, so that the loss falls. Its meta.json has no digests."""
    write_dataset(folder, 8)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB}))
    return folder


def lines(path):
    """The complete lines of a log."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().split("\n")[:-1]]


def metrics(out, timeless=False):
    """The lines of metrics.jsonl. timeless: without the metrics that are times."""
    found = lines(out / "metrics.jsonl")
    return [{key: v for key, v in line.items() if not (timeless and key.startswith("time/"))} for line in found]


def steps(out):
    """The steps that metrics.jsonl has lines of."""
    return [line["step"] for line in metrics(out)]


def val_losses(out):
    """The validation losses in metrics.jsonl."""
    return [line["val/loss"] for line in metrics(out) if "val/loss" in line]


def config_of(out):
    return json.loads((out / "config.json").read_text())


def checkpoint(out, name="ckpt.pt"):
    return torch.load(out / name, weights_only=True)


def leaves(value, path=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {path: value}
    return {name: leaf for key, v in items for name, leaf in leaves(v, f"{path}/{key}").items()}


def differing(a, b):
    """Paths in two nested dicts of the same keys where not every bit is the same."""

    def same(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return {path for path in a if not same(a[path], b[path])}


def differing_state(a, b, name="ckpt.pt", without=()):
    """Paths in the checkpoints of two folders where not every bit is the same, without keys that hold times."""
    without = ("config", "history", "lines_sha256", *without)
    a, b = ({key: value for key, value in checkpoint(out, name).items() if key not in without} for out in (a, b))
    assert a["optimizer"]["state"] and a["chrono"]
    return differing(a, b)


def assert_same_run(out, expected):
    """Two runs have the same state bit for bit, and the same lines except times."""
    assert differing_state(out, expected) == set()
    assert metrics(out, timeless=True) == metrics(expected, timeless=True)
    assert lines(out / "decisions.jsonl") == lines(expected / "decisions.jsonl")


def snapshot(out):
    """Contents and modification times of the files of a run, without the lock."""
    files = [p for p in out.iterdir() if p.is_file() and not p.name.startswith(".lock")]
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def shared_lists(depth, width=2):
    """A list that is small in memory and in a file, and has over width^depth elements when it is printed."""
    value = ["ha"]
    for _ in range(depth):
        value = [value] * width
    return value


def error_of(call, *args, **kwargs):
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert message and "\n" not in message, message
    return message
