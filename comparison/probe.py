"""The constraint probe: does beta change the output more if fewer experts may be chosen?

A trained model is evaluated with top_k set to 1, 2, ..., E, with its beta and with beta 0, on the fixed validation
batches. Reported are the difference in loss, the share of the top-K set that beta changes, and the gate mass it moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe import ChronoRouter, Routing
from comparison.runs import Run, check_is_last
from model import GPT
from trainer import checkpoint
from trainer.data import EVAL_SEED, TokenData, open_dataset
from trainer.errors import UserError
from trainer.settings import domain
from trainer.weights import build_model


@dataclass(frozen=True)
class Probe:
    """The effect of beta at one top_k; means over layers and tokens."""

    top_k: int
    loss: float  # with beta, nats per token
    loss_difference: float  # with beta minus with beta 0
    set_changed: float  # share of the top-K set, 0 to 1
    gate_mass_moved: float  # 0 to 1


def load_trained(run: Run) -> tuple[GPT, dict[str, Any]]:
    """A run's trained model in eval mode on the CPU, and its checkpoint.

    Raises UserError if the checkpoint of the run's last step is missing or damaged.
    """
    if run.folder is None:
        raise UserError("its checkpoint is not on this machine")
    path = run.folder / checkpoint.NAME
    try:
        saved = checkpoint.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except checkpoint.Damaged as e:
        raise UserError(f"{path} is damaged: {e}") from None
    check_is_last(run, saved, path)
    return build_model(saved, str(path)).eval(), saved


def load_model(run: Run) -> tuple[GPT, TokenData]:
    """A run's trained model in eval mode on the CPU, and its data.

    Raises UserError as `load_trained`, or if the data are not the run's.
    """
    model, saved = load_trained(run)
    return model, open_data([run], run.config["dataset"], model, saved.get("data"))


def open_data(runs: list[Run], name: str, model: GPT, known: dict[str, Any] | None = None) -> TokenData:
    """The dataset `name`, for a model. known: see `TokenData.fingerprint`.

    Raises UserError if its files are missing or damaged, or are not those that each of the runs was trained on.
    """
    data = open_dataset(name, model.config.block_size)
    data.vocab_size = model.config.vocab_size
    found = {file: of_file["sha256"] for file, of_file in data.fingerprint(known).items()}
    for run in runs:
        digests = run.config.get("data_sha256") or {}
        # a run on several datasets records the files of all but the first with the name of the dataset
        prefix = "" if name == run.config["dataset"] else f"{domain(name)}/"
        if any(digests.get(prefix + file) != sha256 for file, sha256 in found.items()):
            raise UserError(f"the files of {name} are not those that {run.name} was trained on")
    return data


def probe(run: Run, batches: int = 8, batch_size: int = 16) -> list[Probe]:
    """Probe a run's trained model at every top_k. Raises UserError as `load_model`."""
    return probe_model(*load_model(run), batches, batch_size)


@torch.no_grad()
def probe_model(model: GPT, data: TokenData, batches: int, batch_size: int) -> list[Probe]:
    """Probe a model at every top_k. Its top_k and beta are the same afterwards."""
    results = []
    beta = model.router_state.beta_coeff.clone()
    for top_k in range(1, model.config.n_exp + 1):
        loss, set_changed, moved = _evaluate(model, data, top_k, beta, batches, batch_size)
        loss_without, *_ = _evaluate(model, data, top_k, torch.zeros_like(beta), batches, batch_size)
        results.append(Probe(top_k, loss, loss - loss_without, set_changed, moved))
    return results


@contextlib.contextmanager
def routing_with(
    model: GPT, top_k: int, beta: Tensor, observe: Callable[[ChronoRouter, Routing], None]
) -> Iterator[None]:
    """Route with this top_k and beta [L, E] while the block is open. `observe` is called with each layer's routing.

    top_k and beta of the model are the same afterwards. logit_std and r stay those of the model.
    """
    routers = [model.transformer.h[block].mlp.router for block in model.config.moe_blocks]
    state = model.router_state.beta_coeff
    own_beta, own_top_k = state.clone(), [router.top_k for router in routers]
    hooks = [router.register_forward_hook(lambda router, _, routing: observe(router, routing)) for router in routers]
    try:
        state.copy_(beta)
        for router in routers:
            router.top_k = top_k
        yield
    finally:
        state.copy_(own_beta)
        for router, value in zip(routers, own_top_k):
            router.top_k = value
        for hook in hooks:
            hook.remove()


def _evaluate(
    model: GPT, data: TokenData, top_k: int, beta: Tensor, batches: int, batch_size: int
) -> tuple[float, float, float]:
    """(loss, share of the set changed, gate mass moved) at a top_k with a beta."""
    moved: list[Tensor] = []
    losses, changed = [], []
    with routing_with(model, top_k, beta, lambda router, routing: moved.append(gate_mass_moved(router, routing))):
        for i in range(batches):
            _, loss, trace = model(*data.batch("val", EVAL_SEED, 0, i, batch_size), return_trace=True)
            losses.append(loss)
            changed.append(trace.flip_set.mean() / trace.tokens)
    return tuple(torch.stack(values).mean().item() for values in (losses, changed, moved))


def gate_mass_moved(router: ChronoRouter, routing: Routing) -> Tensor:
    """Mean over tokens of the gate mass that clean routing would give to other experts: [], 0 to 1."""
    clean, experts = routing.z_clean.topk(router.top_k, dim=-1)
    without = torch.zeros_like(routing.z_clean).scatter(-1, experts, router.gates_of(clean, routing.z_clean))
    used = torch.zeros_like(routing.z_clean).scatter(-1, routing.experts, routing.gates)
    return (used - without).clamp_min(0).sum(-1).mean()
