"""Measure the worth of every expert of a trained run, and what the criteria need.

The worth of an expert is the rise of the validation loss, in nats per token, when it is masked (see interventions.py).
It is the mean of the differences per batch; its standard error is that of the mean.

Shapes: n batches, L MoE layers, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from auditing.cache import Cache, complete_lines, file_sha256
from auditing.criteria import Observed, scores, trained_phi, weight_statistics
from comparison.runs import Run, check_is_last
from trainer import checkpoint, setup
from trainer.errors import UserError
from trainer.interventions import SUMS, Batch, moe_layer

RELIABLE = 0.9  # share of the variance of measured worth between the experts of a layer that is not error
CACHE = Path("audit") / "measurements.jsonl"  # in the folder of a run
MEANS = ("phi", "phi_leave_one_out")  # fields of LayerSums that are averaged over batches; the others are added


class Stopped(Exception):
    """A signal ended the audit. What was measured is kept.

    Attributes:
        status: exit status of the program.
    """

    def __init__(self, status: int):
        super().__init__()
        self.status = status


@dataclass(frozen=True)
class Measured:
    """The measurements of one run."""

    run: Run
    blocks: list[int]  # transformer block of each layer
    top_k: int
    base: np.ndarray  # [n] loss
    masked: np.ndarray  # [n, L, E] rise of the loss with one expert masked
    zeroed: np.ndarray  # [n, L, E] rise of the loss with one expert's output set to zero
    scores: dict[str, np.ndarray]  # [L, E] by criterion

    @property
    def worth(self) -> np.ndarray:
        """[L, E] rise of the loss with one expert masked."""
        return self.masked.mean(0)

    @property
    def worth_zeroed(self) -> np.ndarray:
        return self.zeroed.mean(0)

    @property
    def error(self) -> np.ndarray:
        """[L, E] standard error of `worth`."""
        return standard_error(self.masked)

    @property
    def reliability(self) -> np.ndarray:
        """[L] share of the variance of `worth` between experts that is not measurement error, at most 1."""
        return reliability(self.masked)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first dimension; infinite for one value."""
    n = len(values)
    return values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], math.inf)


def reliability(masked: np.ndarray) -> np.ndarray:
    """See Measured. From masked [n, L, E]; 0 where all experts have the same worth."""
    between, error = masked.mean(0).var(-1, ddof=1), np.square(standard_error(masked)).mean(-1)
    ratio = np.divide(error, between, out=np.full_like(error, math.inf), where=between > 0)
    return 1 - np.minimum(ratio, 1)


def folder_of(run: Run) -> Path:
    """The folder of a run. Raises UserError if it is not on this machine."""
    if run.folder is None:
        raise UserError(f"{run.name}: its files are not on this machine")
    return run.folder


@contextlib.contextmanager
def opened(run: Run, *arguments: str, device: str = "auto") -> Iterator[setup.Run]:
    """The trained model, optimizer, loop and data of a finished run. Nothing is written to its folder.

    arguments: of train.py. Raises UserError if its checkpoint is missing, damaged, not that of the run's last step, or
    of other settings, or if its data have changed; Stopped at the end, after a signal.
    """
    path = folder_of(run) / checkpoint.NAME
    try:
        check_is_last(run, checkpoint.without_tensors(path), path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: the audit needs the checkpoint of the last step") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except checkpoint.Damaged as e:
        raise UserError(f"{path} is damaged: {e}") from None
    fixed = ["--init_from=resume", f"--out_dir={run.folder}", "--eval_only=True", f"--device={device}"]
    eager = ["--compile=False", "--fuse=False"]  # hooks are not a part of compiled or fused graphs
    with setup.open_run([*fixed, *eager, *arguments]) as trained:
        if trained.start.damaged:  # by its digest
            raise UserError(f"{path} is damaged: the audit needs the checkpoint of the last step")
        yield trained
        check_signal(trained)  # one that came after the last measurement


@contextlib.contextmanager
def opened_to_measure(run: Run, device: str = "auto") -> Iterator[setup.Run]:
    """`opened`, in float32 and eval mode, without gradients of parameters.

    Raises UserError also if the model has no experts, or none that can be masked.
    """
    with opened(run, "--dtype=float32", device=device) as trained:
        model = trained.model.eval().requires_grad_(False)
        if not model.config.moe_blocks:
            raise UserError(f"{run.name}: the model has no experts to audit")
        if model.config.top_k == model.config.n_exp:
            raise UserError(f"{run.name}: every token uses all {model.config.n_exp} experts, so none can be masked")
        yield trained


def cache_of(run: Run, trained: setup.Run) -> Cache:
    """The cache of a run, for its checkpoint and this device."""
    folder = folder_of(run)
    identity = {"checkpoint_sha256": file_sha256(folder / checkpoint.NAME), "device": trained.device.type}
    return Cache(folder / CACHE, identity)


def measure(run: Run, trained: setup.Run, cache: Cache, least: int, most: int) -> Measured:
    """Measure on `least` batches; double their number until worth is RELIABLE in every layer, up to `most`.

    Raises Stopped after a signal.
    """
    lines = cache.values("batch")
    model = next((line["model"] for line in cache.lines if "model" in line), None)
    if model is None:
        model = of_model(trained)
        cache.append({"model": model})
    n = least
    while True:
        for i in tqdm(range(n), desc=f"{run.name}: batches", leave=False, disable=None):
            if i not in lines:
                line = {"batch": i} | measure_batch(trained, i)
                cache.append(line)
                lines[i] = line
        found = _measured(run, model, [lines[i] for i in range(n)])
        if n >= most or found.reliability.min() >= RELIABLE:
            return found
        n = min(2 * n, most)


def measure_batch(trained: setup.Run, index: int) -> dict[str, Any]:
    """Losses and sums of one validation batch, as lists. Raises Stopped after a signal."""
    model = trained.model
    blocks, experts = model.config.moe_blocks, range(model.config.n_exp)
    batch = Batch(model, *trained.batches.validation(index))
    masked: list[list[float]] = []
    zeroed: list[list[float]] = []
    for block in blocks:
        masked.append([])
        zeroed.append([])
        for e in experts:
            check_signal(trained)
            masked[-1].append(batch.loss_masked({block: (e,)}))
            zeroed[-1].append(batch.loss_zeroed(block, e))
    sums = {name: [getattr(layer, name).tolist() for layer in batch.sums] for name in SUMS}
    return {"loss": batch.loss, "masked": masked, "zeroed": zeroed, **sums}


def check_signal(trained: setup.Run) -> None:
    """Raise Stopped after a signal."""
    if trained.interrupt.received:
        raise Stopped(trained.interrupt.exit_status)


def of_model(trained: setup.Run) -> dict[str, Any]:
    """What the criteria use of the model and the loop, as lists."""
    model = trained.model
    experts = (moe_layer(model, block).experts for block in model.config.moe_blocks)
    absolute, rms = weight_statistics([e.c_fc, e.c_proj] for e in experts)
    phi = {clock: value.tolist() for clock, value in trained_phi(model, trained.loop).items()}
    weights = {"weights_abs": absolute.tolist(), "weights_rms": rms.tolist()}
    return {"blocks": model.config.moe_blocks, "top_k": model.config.top_k, "phi": phi, **weights}


def from_cache(run: Run) -> Measured | None:
    """The measurements in the folder of a run, if they are of its checkpoint; None otherwise."""
    if run.folder is None:
        return None
    try:
        lines = complete_lines(run.folder / CACHE)
        if not lines or lines[0]["identity"]["checkpoint_sha256"] != file_sha256(run.folder / checkpoint.NAME):
            return None
        model = next((line["model"] for line in lines if "model" in line), None)
        batches = {line["batch"]: line for line in lines if "batch" in line}
        found = [batches[i] for i in range(len(batches))]
        return _measured(run, model, found) if model and len(found) > 1 else None
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return None


def _measured(run: Run, model: dict[str, Any], lines: list[dict[str, Any]]) -> Measured:
    base = np.array([line["loss"] for line in lines])
    rises = {name: np.array([line[name] for line in lines]) - base[:, None, None] for name in ("masked", "zeroed")}
    found = {name: score.numpy() for name, score in scores(observed(lines, model, run.seed)).items()}
    return Measured(run, model["blocks"], model["top_k"], base, scores=found, **rises)


def observed(lines: list[dict[str, Any]], model: dict[str, Any], seed: int) -> Observed:
    """What the criteria use, from the lines of all batches and of the model."""
    values = over_batches({name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in SUMS})
    trained = {clock: torch.tensor(phi, dtype=torch.float64) for clock, phi in model["phi"].items()}
    weights = {name: torch.tensor(model[name], dtype=torch.float64) for name in ("weights_abs", "weights_rms")}
    return Observed(**values, trained=trained, **weights, seed=seed)


def over_batches(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LayerSums of all batches, [L, E], from those of each, [n, L, E]. phi: the mean over batches with tokens."""
    has_tokens = (sums["tokens"] > 0).double()
    return {
        name: (value * has_tokens).sum(0) / has_tokens.sum(0).clamp_min(1) if name in MEANS else value.sum(0)
        for name, value in sums.items()
    }
