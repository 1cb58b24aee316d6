"""Weights that a new run starts from: a checkpoint's, GPT-2's, and dense ones turned into experts."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTConfig, MLPExperts
from trainer import checkpoint as checkpoints
from trainer.errors import UserError, first_line
from trainer.settings import PREFIX, names_with_role

HUB = "huggingface.co"
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SHAPE = names_with_role("model")
STATE = "router_state."  # how the names of the loop's state in a model's state dict begin
OF_DENSE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "chrono")
# GPTConfig's arguments that a dense checkpoint does not decide: its MLPs may be turned into experts
OF_EXPERTS = tuple(f.name for f in dataclasses.fields(GPTConfig) if f.name not in OF_DENSE)
BY_NAME = ("scratch", "resume", "auto", *GPT2)


def find(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights by name, settings) of GPT-2 by name, or of a checkpoint file or folder.

    The weights of a checkpoint include the loop's state. The settings are GPTConfig's arguments and, of a checkpoint,
    the loop's. A folder may hold a run, or GPT-2's weights as transformers saves them. Raises UserError if there are
    none.
    """
    path = Path(source)
    if source in GPT2 or all(os.path.isfile(path / name) for name in ("config.json", "model.safetensors")):
        return _gpt2(source)
    if os.path.isdir(path):
        path = path / checkpoints.NAME
    try:
        saved = checkpoints.load(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(source, BY_NAME, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(map(repr, BY_NAME))}, or a file"
        raise UserError(f"init_from={source!r}: there is no checkpoint {path}; {hint}") from None
    except checkpoints.Damaged as e:
        raise UserError(f"{path} is damaged: {e}") from None
    config = saved.get("config")
    config = config if isinstance(config, dict) else {}
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    found = {k: v for k, v in config.items() if k in fields or k.startswith(PREFIX)} | saved["model_args"]
    return plain_names(saved["model"]), found


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, without the prefix under which nanoMoE saves a compiled model."""
    return {name.removeprefix("_orig_mod."): value for name, value in weights.items()}


def without_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name, without the loop's state."""
    return {name: value for name, value in weights.items() if not name.startswith(STATE)}


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of weights, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _gpt2(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if source in GPT2 and not _reachable(HUB):
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # what is in the cache, or an error at once instead of half a minute of retries
        )
    try:
        model = GPT.from_pretrained(source)
    except ImportError:
        raise UserError(f"init_from={source!r} needs transformers: pip install transformers") from None
    except Exception as e:  # transformers and its hub raise many kinds
        raise UserError(
            f"init_from={source!r}: GPT-2's weights cannot be loaded ({type(e).__name__}: {first_line(e)}); without a "
            "network save them elsewhere with transformers' save_pretrained and give the folder as init_from"
        ) from None
    args = {name: value for name, value in vars(model.config).items() if name in ("vocab_size", *SHAPE)}
    return without_state(model.state_dict()), args


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def put(weights: dict[str, Tensor], source: str, model: GPT) -> list[str]:
    """Load weights into a model of the same shape, or one with a shorter context or experts in place of dense MLPs.

    The loop's state is loaded if it is among the weights.
    Returns lines on what was done. An expert starts as the dense MLP of its block (sparse upcycling, arXiv 2212.05055),
    so before training the model computes what the dense one does if its gates sum to 1 (norm_topk_prob=True); its
    router starts as it was initialised.
    Raises UserError if they do not fit.
    """
    own = model.state_dict()
    found = dict(weights)
    upcycled = 0
    for name, module in model.named_modules():
        if isinstance(module, MLPExperts) and f"{name}.c_fc" not in found:
            upcycled += _upcycle(found, name.removesuffix(".experts"), model.config)
    positions = found.get("transformer.wpe.weight")
    if positions is not None:
        found["transformer.wpe.weight"] = positions[: model.config.block_size]
    fresh = [name for name in own if name not in found]
    allowed = [n for n in fresh if n.startswith(STATE) or (upcycled and ".router." in n)]
    if fresh != allowed:
        lacking = next(name for name in fresh if name not in allowed)
        raise UserError(f"init_from={source!r} does not fit the model: it lacks {lacking}")
    try:
        model.load_state_dict(own | found)
    except RuntimeError as e:
        reason = " ".join(str(e).split()[:40])
        raise UserError(f"init_from={source!r} does not fit the model: {reason}") from None
    return [f"{upcycled} dense MLPs became {model.config.n_exp} experts each"] if upcycled else []


def _upcycle(found: dict[str, Tensor], mlp: str, config: GPTConfig) -> bool:
    """Replace a block's dense MLP by that many copies of it, in `found`."""
    dense = {"c_fc": "c_fc.weight", "c_proj": "c_proj.weight", "fc_bias": "c_fc.bias", "proj_bias": "c_proj.bias"}
    if f"{mlp}.c_fc.weight" not in found:
        return False
    for ours, theirs in dense.items():
        value = found.pop(f"{mlp}.{theirs}", None)
        if value is not None:
            one = value.t() if value.dim() == 2 else value.unsqueeze(0)
            found[f"{mlp}.experts.{ours}"] = one.expand(config.n_exp, *one.shape).clone()
    return True
