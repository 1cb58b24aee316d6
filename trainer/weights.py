"""Build models from weights: a checkpoint's, GPT-2's, and dense weights turned into experts."""

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

from chronomoe import ChronoConfig
from model import GPT, GPT2_MODELS, DenseConfig, GPTConfig
from ops.experts import MLPExperts
from trainer import checkpoint
from trainer.errors import UserError, first_line
from trainer.settings import PREFIX, names_with_role

HUB = "huggingface.co"
HUB_TIMEOUT = 3.0  # seconds
COMPILED = "_orig_mod."  # prefix of the weights that nanoMoE saves from a compiled model
STATE = "router_state."  # prefix of the loop's state in a model's state dict
SOURCES = ("scratch", "resume", "auto", *GPT2_MODELS)
FIELDS = {f.name for f in dataclasses.fields(GPTConfig)}
# GPTConfig's fields that a dense checkpoint does not fix: its MLPs can be turned into experts
EXPERT_FIELDS = FIELDS - {f.name for f in dataclasses.fields(DenseConfig)} - {"chrono"}

Weights = dict[str, Tensor]


def build_model(saved: dict[str, Any], source: str) -> GPT:
    """Build the model of a checkpoint of this program or of nanoMoE, on the CPU. Raises UserError."""
    config = saved.get("config", {})
    try:
        names = [f.name for f in dataclasses.fields(ChronoConfig) if PREFIX + f.name in config]
        chrono = ChronoConfig(**{name: config[PREFIX + name] for name in names})
        shape = {name: value for name, value in saved["model_args"].items() if name in FIELDS - {"chrono"}}
        model = GPT(GPTConfig(**shape, chrono=chrono))
        model.load_state_dict(complete_weights(saved["model"], model))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{source} does not fit its own settings: {' '.join(str(e).split()[:40])}") from None
    return model


def complete_weights(weights: Weights, model: GPT) -> Weights:
    """The weights of a checkpoint under this program's names; nanoMoE's get the model's initial loop state."""
    plain = {name.removeprefix(COMPILED): value for name, value in weights.items()}
    return model.router_state.state_dict(prefix=STATE) | plain


def find_weights(source: str) -> tuple[Weights, dict[str, Any]]:
    """(weights, settings) of GPT-2 by name, or of a checkpoint file or folder.

    The weights of a checkpoint include the loop's state. The settings are GPTConfig's arguments and, for a checkpoint,
    the loop's. A folder may hold a run, or a GPT-2 as saved by transformers. Raises UserError if there are none.
    """
    if is_gpt2(source):
        return _gpt2(source)
    saved = load_checkpoint(source)
    config = saved.get("config", {})
    settings = {k: v for k, v in config.items() if k in FIELDS or k.startswith(PREFIX)} | saved["model_args"]
    return {name.removeprefix(COMPILED): value for name, value in saved["model"].items()}, settings


def is_gpt2(source: str) -> bool:
    """Whether `source` names a GPT-2, or a folder with one as saved by transformers."""
    files = ("config.json", "model.safetensors")
    return source in GPT2_MODELS or all(os.path.isfile(Path(source) / name) for name in files)


def checkpoint_path(source: str) -> Path:
    """The checkpoint that a file or a run's folder stands for."""
    return Path(source) / checkpoint.NAME if os.path.isdir(source) else Path(source)


def load_checkpoint(source: str) -> dict[str, Any]:
    """Load the checkpoint in a file or in a run's folder. Raises UserError if there is none."""
    path = checkpoint_path(source)
    try:
        return checkpoint.load(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(map(repr, SOURCES))}, or a path"
        raise UserError(f"init_from={source!r}: there is no checkpoint {path}; {hint}") from None
    except checkpoint.Damaged as e:
        raise UserError(f"{path} is damaged: {e}") from None


def without_state(weights: Weights) -> Weights:
    """The weights without the loop's state."""
    return {name: value for name, value in weights.items() if not name.startswith(STATE)}


def weights_sha256(weights: Weights) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of weights, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _gpt2(source: str) -> tuple[Weights, dict[str, Any]]:
    if source in GPT2_MODELS and not _is_reachable(HUB):
        # use the cache, or fail at once instead of retrying for half a minute
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        model = GPT.from_pretrained(source)
    except ImportError:
        raise UserError(f"init_from={source!r} needs transformers: pip install transformers") from None
    except Exception as e:  # transformers and its hub raise many kinds
        raise UserError(
            f"init_from={source!r}: GPT-2's weights cannot be loaded ({type(e).__name__}: {first_line(e)}); without a "
            "network save them elsewhere with transformers' save_pretrained and give the folder as init_from"
        ) from None
    shape = ("vocab_size", *names_with_role("model"))
    return without_state(model.state_dict()), {k: v for k, v in vars(model.config).items() if k in shape}


def _is_reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def start_from(weights: Weights, source: str, model: GPT) -> list[str]:
    """Load weights into a new model, which may have a shorter context, or experts in place of dense MLPs.

    Each expert starts as a copy of the dense MLP of its block (sparse upcycling, arXiv 2212.05055), so before training
    the model computes what the dense model does, if its gates sum to 1 (norm_topk_prob=True). The router keeps its
    initial weights. The loop's state is loaded if it is among the weights.

    Returns notes for the user. Raises UserError if the weights do not fit.
    """
    found = complete_weights(weights, model)
    upcycled = 0
    for name, module in model.named_modules():
        if isinstance(module, MLPExperts) and f"{name}.c_fc" not in found:
            upcycled += _upcycle(found, name.removesuffix(".experts"), model.config)
    positions = found.get("transformer.wpe.weight")
    if positions is not None:
        found["transformer.wpe.weight"] = positions[: model.config.block_size]
    own = model.state_dict()
    routers = {name: value for name, value in own.items() if upcycled and ".router." in name}
    lacking = [name for name in own if name not in found and name not in routers]
    if lacking:
        raise UserError(f"init_from={source!r} does not fit the model: it lacks {lacking[0]}")
    try:
        model.load_state_dict(routers | found)
    except RuntimeError as e:
        raise UserError(f"init_from={source!r} does not fit the model: {' '.join(str(e).split()[:40])}") from None
    return [f"{upcycled} dense MLPs became {model.config.n_exp} experts each"] if upcycled else []


def _upcycle(found: Weights, mlp: str, config: GPTConfig) -> bool:
    """Replace the dense MLP of a block by copies of it, in `found`. Returns whether there was one."""
    dense = {"c_fc": "c_fc.weight", "c_proj": "c_proj.weight", "fc_bias": "c_fc.bias", "proj_bias": "c_proj.bias"}
    if f"{mlp}.c_fc.weight" not in found:
        return False
    for ours, theirs in dense.items():
        value = found.pop(f"{mlp}.{theirs}", None)
        if value is not None:
            one = value.t() if value.dim() == 2 else value.unsqueeze(0)
            found[f"{mlp}.experts.{ours}"] = one.expand(config.n_exp, *one.shape).clone()
    return True
