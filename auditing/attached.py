"""The audit of a model that `chronomoe.attach` knows: worth and criteria from batches of validation text.

    handle = chronomoe.attach(model, config)
    found = audit(handle, loader)              # batches as the model takes them, with labels
    found.correlations["reap"]                 # [L], Spearman's, of criterion and worth

Worth is the rise of the loss, in nats per token, when an expert is masked from routing. It takes L * E + 1 forwards per
batch. The loss is that of the labels, without the auxiliary loss.

Shapes: n batches, L MoE layers, E experts, N tokens, K top_k, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auditing.agreement import rank_correlation
from auditing.criteria import Observed, scores, weight_statistics
from auditing.measure import over_batches, standard_error
from chronomoe.attach import Handle, Slots
from chronomoe.coherence import CLOCKS
from trainer.interventions import SUMS, LayerSums, expert_sums


@dataclass(frozen=True)
class AttachedAudit:
    """The measurements of an attached model."""

    blocks: list[int]  # transformer block of each layer
    base: np.ndarray  # [n] loss
    masked: np.ndarray  # [n, L, E] rise of the loss with one expert masked
    scores: dict[str, np.ndarray]  # [L, E] by criterion

    @property
    def worth(self) -> np.ndarray:
        """[L, E] rise of the loss with one expert masked."""
        return self.masked.mean(0)

    @property
    def error(self) -> np.ndarray:
        """[L, E] standard error of `worth`; infinite for one batch."""
        return standard_error(self.masked)

    @property
    def correlations(self) -> dict[str, np.ndarray]:
        """Spearman's correlation of each criterion and worth, [L]; NaN if one of them is constant."""
        return {
            name: np.array([rank_correlation(*pair) for pair in zip(score, self.worth)])
            for name, score in self.scores.items()
        }


def audit(handle: Handle, batches: Iterable[Mapping[str, Tensor]], seed: int = 0) -> AttachedAudit:
    """Measure an attached model, with its beta, on batches whose forward returns a loss.

    seed: of the criterion 'random'. Changes neither the model nor the loop's state. Raises ValueError without batches,
    for a batch without a loss, or if fewer than K experts would be left.
    """
    blocks = handle.loop.layer_ids
    num_experts = handle.loop.router_state.beta_coeff.shape[1]
    base, masked, sums = [], [], []
    with _evaluation(handle):
        for batch in batches:
            sums.append(_sums(handle, batch))
            with torch.no_grad():
                base.append(_loss(handle, batch).item())
                rises = []
                for block in blocks:
                    for expert in range(num_experts):
                        with handle.masked({block: [expert]}):
                            rises.append(_loss(handle, batch).item() - base[-1])
            masked.append(rises)
    if not base:
        raise ValueError("audit needs at least one batch")
    found = _observed(handle, sums, seed)
    shape = (len(base), len(blocks), num_experts)
    by_name = {name: score.numpy() for name, score in scores(found).items()}
    return AttachedAudit(blocks, np.array(base), np.array(masked).reshape(shape), by_name)


@contextlib.contextmanager
def _evaluation(handle: Handle) -> Iterator[None]:
    was_training = handle.model.training
    handle.model.eval()
    try:
        yield
    finally:
        handle.model.train(was_training)


def _loss(handle: Handle, batch: Mapping[str, Tensor]) -> Tensor:
    config: Any = getattr(handle.model, "config", None)
    # else the loss includes the auxiliary loss
    options = {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}
    loss = getattr(handle.model(**batch, **options), "loss", None)
    if loss is None:
        raise ValueError(f"the model returns no loss for a batch of {sorted(batch)}: give it labels")
    return loss


def _sums(handle: Handle, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of Observed of one batch, [L, E] float64."""
    with torch.enable_grad(), handle.observed() as observed:
        loss = _loss(handle, batch)
        layers = [observed[block] for block in handle.loop.layer_ids]
        gradients = torch.autograd.grad(loss, [layer.weights for layer in layers])
    num_experts = handle.loop.router_state.beta_coeff.shape[1]
    by_layer = [_layer_sums(layer, grad, num_experts) for layer, grad in zip(layers, gradients)]
    return {name: torch.stack([getattr(sums, name) for sums in by_layer]) for name in SUMS}


def _layer_sums(layer: Slots, grad: Tensor, num_experts: int) -> LayerSums:
    weights = layer.weights.detach().flatten()
    first_order = (weights * grad.flatten()).abs()
    every = torch.ones_like(weights)
    return expert_sums(layer.experts.flatten(), layer.y.flatten(0, 1), every, weights, first_order, num_experts)


@torch.no_grad()
def _observed(handle: Handle, sums: list[dict[str, Tensor]], seed: int) -> Observed:
    total = over_batches({name: torch.stack([s[name] for s in sums]) for name in SUMS})
    trained = {}
    if handle.config.coherence and handle.loop.coherence.step > 0:
        trained = {clock: handle.loop.coherence.phi(clock).cpu().double() for clock in CLOCKS}
    weights_abs, weights_rms = weight_statistics(_matrices(layer.experts) for layer in handle.layers)
    return Observed(**total, trained=trained, weights_abs=weights_abs, weights_rms=weights_rms, seed=seed)


def _matrices(experts: torch.nn.Module) -> list[Tensor]:
    """The weight matrices of all experts, stacked along dimension 0; all parameters if none has three dimensions."""
    parameters = list(experts.parameters())
    return [p for p in parameters if p.dim() > 2] or parameters
