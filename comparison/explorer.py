"""A page that shows how a model routes a text: each token coloured by the expert that took it, with beta on and off.

The page is one file with its data and script, and loads nothing. It holds, for each token, its loss, and for each MoE
layer the experts with the highest probability, clean and biased.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chronomoe import Routing
from data.tokenizer import Codec
from model import GPT
from trainer.errors import UserError
from trainer.files import atomic_write

TEMPLATE = Path(__file__).with_name("explorer.html")
SHOWN = 4  # experts listed per token, at least top_k
MAX_ENTRIES = 60_000  # (token, layer, listed expert) per setting of beta; keeps the page below 5 MB
DIGITS = 3


def num_windows(model: GPT, length: int, most: int = 8) -> int:
    """How many windows of `length` tokens fit into a page, at least 1."""
    per_token = len(model.config.moe_blocks) * listed(model)
    return max(1, min(most, MAX_ENTRIES // max(1, per_token * length)))


def listed(model: GPT) -> int:
    """Number of experts listed per token and layer."""
    return min(model.config.n_exp, max(SHOWN, model.config.top_k))


@torch.no_grad()
def explore(
    model: GPT, codec: Codec, windows: list[Tensor], autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """The page's data: the routing of each window with the trained beta, and with beta 0 if the model has learnt one.

    windows: [T] token ids each, on the model's device. Raises UserError for a dense model, or a window of one token.
    """
    if not model.config.moe_blocks or model.config.n_exp == 1:
        raise UserError("the model is dense: only a model with experts has routing to explore")
    if min(map(len, windows)) < 2:
        raise UserError("the text has one token: give at least two")
    beta = model.router_state.beta_coeff
    trained = beta.clone()
    found = {"on": [measure(model, ids, autocast) for ids in windows]}
    if model.config.chrono.router and trained.any():
        beta.zero_()
        found["off"] = [measure(model, ids, autocast) for ids in windows]
        beta.copy_(trained)
    return {
        "layers": model.config.moe_blocks,
        "experts": model.config.n_exp,
        "topK": model.config.top_k,
        "texts": [[codec.decode([int(i)]) for i in ids] for ids in windows],
        "beta": found,
    }


def measure(model: GPT, ids: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    """Loss and routing of token ids [T].

    loss: nats, of each token given those before it; None for the first. layers: `layer_routing` of each MoE layer.
    """
    routings: list[Routing] = []
    hooks = [
        model.transformer.h[block].mlp.router.register_forward_hook(lambda *call: routings.append(call[-1]))
        for block in model.config.moe_blocks
    ]
    try:
        with autocast():
            logits, *_ = model(ids[None], ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    losses = F.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none").tolist()
    return {
        "loss": [None, *(round(loss, DIGITS) for loss in losses)],
        "layers": [layer_routing(routing, listed(model)) for routing in routings],
    }


def layer_routing(routing: Routing, count: int) -> dict[str, Any]:
    """The routing of one layer.

    tokens: per token, the `count` experts with the highest biased probability, in falling order, as [expert, clean
    probability, biased probability, gate or 0]. moved: per token, 1 if beta changed its set of experts, given the same
    hidden state.
    """
    clean, biased = routing.z_clean.softmax(-1), routing.z_biased.softmax(-1)
    gates = torch.zeros_like(clean).scatter(-1, routing.experts, routing.gates.to(clean.dtype))
    best = routing.z_biased.topk(count).indices
    columns = [x.gather(-1, best).tolist() for x in (clean, biased, gates)]
    rows = [
        [[expert, *(round(x, DIGITS) for x in values)] for expert, *values in zip(experts, *of_token)]
        for experts, *of_token in zip(best.tolist(), *columns)
    ]
    top_k = routing.experts.shape[-1]
    unbiased = routing.z_clean.topk(top_k).indices.sort(-1).values
    moved = (unbiased != routing.experts.sort(-1).values).any(-1)
    return {"tokens": rows, "moved": moved.long().tolist()}


def write(path: Path, data: dict[str, Any], title: str) -> None:
    """Write the page. Raises UserError if the file cannot be written."""
    # "<" cannot end the script element
    content = json.dumps(data | {"title": title}, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(page.encode(errors="backslashreplace"))  # the name of a folder need not be text
    except (OSError, ValueError) as e:  # ValueError for a path without a name, such as '.'
        raise UserError(
            f"cannot write {path}: {e.strerror if isinstance(e, OSError) else 'it is not a file'}"
        ) from None
