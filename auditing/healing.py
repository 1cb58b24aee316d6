"""Healing: prune what each criterion ranks lowest, train on, and compare with the untouched twin.

A pruned expert is masked from then on. In its layer logit_std does not change any more, because the logits of masked
experts are infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from auditing.cache import Cache
from auditing.measure import Measured
from auditing.subsets import lowest
from auditing.twins import Twin
from trainer.errors import UserError
from trainer.interventions import mask_key, masked


@dataclass(frozen=True)
class Healing:
    """The validation loss minus that of the twin, nats per token, after pruning in every layer."""

    criterion: str
    pruned: int  # experts per layer
    steps: int
    at_once: float  # before the first step
    at_end: float  # after the last step


def heal(measured: Measured, twin: Twin, cache: Cache, steps: int, size: int) -> list[Healing]:
    """Prune the `size` experts per layer that each criterion ranks lowest, and train on.

    Raises UserError if that leaves fewer than top_k, Stopped after a signal.
    """
    most = measured.worth.shape[1] - measured.top_k
    if size > most:
        raise UserError(f"{measured.run.name}: --prune={size} leaves fewer than top_k experts; at most {most} can go")
    choices = {
        name: {block: lowest(score[layer], size) for layer, block in enumerate(measured.blocks)}
        for name, score in measured.scores.items()
    }
    known = {(line["heal"], line["steps"]): line["losses"] for line in cache.lines if "heal" in line}
    wanted = {mask_key(masks): masks for masks in ({}, *choices.values())}
    for key, masks in tqdm(wanted.items(), desc=f"{measured.run.name}: healing", leave=False, disable=None):
        if (key, steps) in known:
            continue
        twin.restart()
        with masked(twin.trained.model, masks):
            losses = [twin.validation_loss()]
            for _ in range(steps):
                twin.step()
            losses.append(twin.validation_loss())
        cache.append({"heal": key, "steps": steps, "losses": losses})
        known[key, steps] = losses
    before, after = known[mask_key({}), steps]
    found = []
    for name, masks in choices.items():
        at_once, at_end = known[mask_key(masks), steps]
        found.append(Healing(name, size, steps, at_once - before, at_end - after))
    return found
