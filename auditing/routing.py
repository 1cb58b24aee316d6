"""The usual picture of a router, by the definitions of OLMoE (https://arxiv.org/abs/2409.02060, section 5).

    saturation(t)          = mean over tokens of |choice(t) & choice(T)| / K, T the last step
    coactivation(i, j)     = number of tokens that go to both i and j / number of tokens that go to i
    specialization(i, v)   = number of times that a token of id v goes to i / number of tokens of id v
    specialization(i, D)   = number of tokens of domain D that go to i / number of tokens of D

Tokens are those of the run's validation batches, by their input id. Domains are the datasets of the run's schedule.

Shapes: L MoE layers, E experts, V token ids, N tokens, K top_k.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auditing.measure import folder_of
from comparison.runs import Run
from model import GPT
from trainer import checkpoint, setup
from trainer.errors import UserError
from trainer.interventions import hooked, moe_layer
from trainer.settings import domain
from trainer.weights import build_model

SHOWN_TOKENS = 5  # ids listed per expert
LEAST_COUNT = 20  # of a listed id

# by (block, expert): (token id, specialization, number of tokens of this id)
Special = dict[tuple[int, int], list[tuple[int, float, int]]]


@dataclass(frozen=True)
class Picture:
    """What the router of a run does with validation text."""

    blocks: list[int]
    coactivation: Tensor  # [L, E, E]; 0 for an expert without tokens
    share: Tensor  # [L, E] of the choices
    special: Special
    saturation: dict[int, list[float]]  # by the step of an earlier checkpoint: of each layer
    domains: dict[str, Tensor]  # [L, E] specialization by domain; empty for a run on one dataset


@torch.no_grad()
def choices(model: GPT, inputs: Tensor) -> Tensor:
    """The experts that the tokens of inputs [B, T] go to: [L, N, K]."""
    found: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for block in model.config.moe_blocks:
            router = moe_layer(model, block).router
            stack.enter_context(hooked(router, lambda _, __, routing: found.append(routing.experts)))
        model(inputs)
    return torch.stack(found)


def picture(run: Run, trained: setup.Run, batches: int) -> Picture:
    """The picture of a run, on its first validation batches, and saturation at its earlier checkpoints."""
    model = trained.model
    layers, experts, vocabulary = len(model.config.moe_blocks), model.config.n_exp, model.config.vocab_size
    together = torch.zeros(layers, experts, experts, device=trained.device)
    by_id = torch.zeros(layers, vocabulary, experts, device=trained.device)
    counts = torch.zeros(vocabulary, dtype=torch.int64, device=trained.device)
    earlier = earlier_models(run, trained)
    shared: dict[int, list[Tensor]] = {step: [] for step, _ in earlier}  # of a batch, by step: [L]
    for i in range(batches):
        inputs, _ = trained.batches.validation(i)
        chosen = choices(model, inputs)
        uses = torch.zeros(*chosen.shape[:2], experts, device=trained.device).scatter(-1, chosen, 1.0)  # [L, N, E]
        together += torch.einsum("lni,lnj->lij", uses, uses)
        by_id.index_add_(1, inputs.flatten(), uses)
        counts += torch.bincount(inputs.flatten(), minlength=vocabulary)
        for step, before in earlier:
            same = choices(before, inputs).unsqueeze(-1) == chosen.unsqueeze(-2)  # [L, N, K, K]
            shared[step].append(same.any(-1).float().mean((1, 2)))
    of_expert = by_id.sum(1)
    saturation = {step: torch.stack(of_batches).mean(0).tolist() for step, of_batches in shared.items()}
    return Picture(
        model.config.moe_blocks,
        (together / of_expert.clamp_min(1).unsqueeze(-1)).cpu(),
        (of_expert / of_expert.sum(-1, keepdim=True)).cpu(),
        _specialists(by_id.cpu(), counts.cpu(), model.config.moe_blocks),
        saturation,
        domain_specialization(trained, batches),
    )


@torch.no_grad()
def domain_specialization(trained: setup.Run, batches: int) -> dict[str, Tensor]:
    """The share of each domain's tokens that each expert gets, [L, E]; empty for a run on one dataset."""
    texts, num_experts = trained.batches.texts, trained.model.config.n_exp
    found = {}
    for dataset in texts if len(texts) > 1 else ():
        inputs = torch.cat([trained.batches.validation(i, dataset)[0] for i in range(batches)])
        chosen = choices(trained.model, inputs)
        counts = torch.zeros(len(chosen), num_experts, device=trained.device)
        counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1), dtype=counts.dtype))
        found[domain(dataset)] = (counts / chosen.shape[1]).cpu()
    return found


def _specialists(by_id: Tensor, counts: Tensor, blocks: list[int]) -> Special:
    """The ids that each expert takes the largest share of, among those that are frequent enough."""
    frequent = counts >= LEAST_COUNT
    share = torch.where(frequent[:, None], by_id / counts.clamp_min(1)[:, None], -1.0)  # [L, V, E]
    count = min(SHOWN_TOKENS, int(frequent.sum()))
    best = share.topk(count, dim=1)
    return {
        (block, e): [
            (int(i), float(s), int(counts[i]))
            for i, s in zip(best.indices[layer, :, e], best.values[layer, :, e])
            if s > 0
        ]
        for layer, block in enumerate(blocks)
        for e in range(by_id.shape[-1])
    }


def earlier_models(run: Run, trained: setup.Run) -> list[tuple[int, GPT]]:
    """(step, model) of the run's other checkpoints, in the order of their steps. Damaged ones are left out."""
    found: dict[int, GPT] = {}
    for path in sorted(folder_of(run).glob("*.pt")):
        if path.name == checkpoint.NAME:
            continue
        with contextlib.suppress(UserError, FileNotFoundError, checkpoint.Damaged):
            saved: dict[str, Any] = checkpoint.load(path)
            if saved["iter_num"] < trained.progress.step and saved["iter_num"] not in found:
                model = build_model(saved, str(path)).to(trained.device).eval()
                if model.config.n_exp == trained.model.config.n_exp:
                    found[saved["iter_num"]] = model
    return sorted(found.items())
