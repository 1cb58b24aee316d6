"""Tiny runs of train.py, and how to read and compare what they leave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
STEPS = 6
VOCAB = 61
TINY = dict(
    **dict(n_layer=3, n_head=2, n_embd=16, n_exp=4, block_size=16, batch_size=4, gradient_accumulation_steps=2),
    **dict(max_iters=STEPS, lr_decay_iters=STEPS, warmup_iters=2, learning_rate=1e-2, min_lr=1e-3),
    **dict(eval_interval=3, eval_iters=2, log_interval=1, device="cpu", wandb_log=False),
)
ALL_ON = {f"chrono_{step}": True for step in ("router", "coherence", "beta", "bridge", "lifecycle")}
NOISY = dict(dropout=0.2, use_noisy_top_k=True)
SLOTS = 2 * 4 * 16 * 2  # micro-batches, sequences, tokens, experts a token


def write_dataset(folder, vocab_size, seed=3):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    sha256 = {}
    for split in ("train", "val"):
        content = rng.integers(0, vocab_size, 3000).astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        sha256[f"{split}.bin"] = hashlib.sha256(content).hexdigest()
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "sha256": sha256}))
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def lines(path):
    """The file's whole lines: a run may be writing another one."""
    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().split("\n")[:-1]]


def metrics(out, timeless=False):
    return [
        {key: value for key, value in line.items() if not (timeless and key.startswith("time/"))}
        for line in lines(out / "metrics.jsonl")
    ]


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


# Keys of a checkpoint that hold settings, times, or a digest of lines that hold times.
OF_A_START = ("config", "history", "lines_sha256")


def differing_state(a, b, name="ckpt.pt"):
    """Paths in two run folders' checkpoints where not every bit is the same, without the keys OF_A_START."""
    a, b = (leaves({k: v for k, v in checkpoint(out, name).items() if k not in OF_A_START}) for out in (a, b))
    assert any(path.startswith("/optimizer/state") for path in a)
    assert any(path.startswith("/chrono") for path in a)
    assert a.keys() == b.keys()

    def same(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return {path for path in a if not same(a[path], b[path])}


def snapshot(out):
    """The files of a run and their times, but for the lock."""
    files = [p for p in out.iterdir() if p.is_file() and not p.name.startswith(".lock")]
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def one_line(error):
    message = str(error.value)
    assert message
    assert "\n" not in message, message
    return message
