"""The constraint probe: does beta change the output more if fewer experts may be chosen?

A trained model is evaluated with top_k set to 1, 2, ..., E, with its beta and with beta 0, on the fixed validation
batches. Reported are the difference in loss, the share of the top-K set that beta changes, and the gate mass it moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe import ChronoRouter, Routing
from comparison.runs import Run, check_is_last
from model import GPT
from trainer import checkpoint
from trainer.data import EVAL_SEED, TokenData, open_dataset
from trainer.errors import UserError
from trainer.weights import build_model


@dataclass(frozen=True)
class Probe:
    """The effect of beta at one top_k; means over layers and tokens."""

    top_k: int
    loss: float  # with beta, nats per token
    loss_difference: float  # with beta minus with beta 0
    set_changed: float  # share of the top-K set, 0 to 1
    gate_mass_moved: float  # 0 to 1


def load_model(run: Run) -> tuple[GPT, TokenData]:
    """A run's trained model in eval mode on the CPU, and its data.

    Raises UserError if the checkpoint of the run's last step is missing or damaged, or the data are not the run's.
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
    model = build_model(saved, str(path))
    data = open_dataset(run.config["dataset"], model.config.block_size)
    data.vocab_size = model.config.vocab_size
    found = {name: file["sha256"] for name, file in data.fingerprint(saved.get("data")).items()}
    if found != run.config.get("data_sha256"):
        raise UserError(f"the files of {run.config['dataset']} are not those that {run.name} was trained on")
    return model.eval(), data


def probe(run: Run, batches: int = 8, batch_size: int = 16) -> list[Probe]:
    """Probe a run's trained model at every top_k. Raises UserError as `load_model`."""
    return probe_model(*load_model(run), batches, batch_size)


@torch.no_grad()
def probe_model(model: GPT, data: TokenData, batches: int, batch_size: int) -> list[Probe]:
    """Probe a model at every top_k. Its top_k and beta are the same afterwards."""
    results = []
    for top_k in range(1, model.config.n_exp + 1):
        loss, set_changed, moved = _evaluate(model, data, top_k, batches, batch_size)
        beta = model.router_state.beta_coeff.clone()
        model.router_state.beta_coeff.zero_()
        loss_without, *_ = _evaluate(model, data, top_k, batches, batch_size)
        model.router_state.beta_coeff.copy_(beta)
        results.append(Probe(top_k, loss, loss - loss_without, set_changed, moved))
    return results


def _evaluate(model: GPT, data: TokenData, top_k: int, batches: int, batch_size: int) -> tuple[float, float, float]:
    """(loss, share of the set changed, gate mass moved) at a top_k."""
    moved: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, ChronoRouter)]
    hooks = [r.register_forward_hook(lambda r, _, routing: moved.append(gate_mass_moved(r, routing))) for r in routers]
    before = [router.top_k for router in routers]
    try:
        for router in routers:
            router.top_k = top_k
        losses, changed = [], []
        for i in range(batches):
            _, loss, trace = model(*data.batch("val", EVAL_SEED, 0, i, batch_size), return_trace=True)
            losses.append(loss)
            changed.append(trace.flip_set.mean() / trace.tokens)
    finally:
        for router, value in zip(routers, before):
            router.top_k = value
        for hook in hooks:
            hook.remove()
    return tuple(torch.stack(values).mean().item() for values in (losses, changed, moved))


def gate_mass_moved(router: ChronoRouter, routing: Routing) -> Tensor:
    """Mean over tokens of the gate mass that clean routing would give to other experts: [], 0 to 1."""
    clean, experts = routing.z_clean.topk(router.top_k, dim=-1)
    without = torch.zeros_like(routing.z_clean).scatter(-1, experts, router.gates_of(clean, routing.z_clean))
    used = torch.zeros_like(routing.z_clean).scatter(-1, routing.experts, routing.gates)
    return (used - without).clamp_min(0).sum(-1).mean()
