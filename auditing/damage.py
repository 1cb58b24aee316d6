"""The damage assay: train on with one damaged expert, and see which signals notice, how soon, and whom they accuse.

A signal raises an alarm for an expert when it has moved from its value before the damage by more than a threshold. The
threshold is such that 5% of the experts of undamaged twins raise an alarm within the same number of steps: the 95%
quantile, over experts, of the largest movement in the undamaged twins of the other runs (of the same run, if there is
only one). Movements of phi are differences, those of load, norms and REAP are differences of logarithms.

The weights of a damaged expert keep their damaged values: training cannot repair it.

Shapes: L MoE layers, E experts, T steps after the damage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from auditing.cache import Cache
from auditing.twins import Twin
from chronomoe.coherence import coherence
from model import GPT
from trainer.errors import UserError
from trainer.interventions import hooked, moe_layer
from trainer.step import StepResult
from trainer.streams import DAMAGE, stream_seed

WARMUP = 20  # undamaged steps before the damage
SMOOTHING = 0.9  # of the EMA of signals that are not smoothed, as phi_fast's default
FALSE_ALARMS = 0.05
SIGNALS = ("phi_fast", "phi_mid", "phi_slow", "phi_leave_one_out", "load", "norm", "reap")
LOGARITHMIC = ("load", "norm", "reap")

Damage = Callable[[Tensor, torch.Generator], Tensor]


def _noise(size: float) -> Damage:
    def damage(w: Tensor, generator: torch.Generator) -> Tensor:
        return size * w.std() * torch.randn(w.shape, generator=generator).to(w)

    return damage


# what becomes of each weight tensor of the expert
DAMAGES: dict[str, Damage] = {
    "zeroed": lambda w, _: torch.zeros_like(w),
    "noise": _noise(1.0),
    "noise x3": _noise(3.0),
    "frozen": lambda w, _: w.clone(),
    "scaled x3": lambda w, _: 3 * w,
}
WEIGHTS = ("c_fc", "fc_bias", "c_proj", "proj_bias")  # of MLPExperts
OUTPUT_ONLY = ("scaled x3",)  # damages that change the last weights only, so that the output is scaled


class NotMeasured(UserError):
    """A run without step 2, whose signals do not exist."""


@dataclass(frozen=True)
class Moved:
    """How far the signals moved after the damage of one expert, or of none."""

    damage: str  # "" for the undamaged twin
    layer: int
    expert: int
    change: dict[str, np.ndarray]  # [T] of the damaged expert by signal; empty for the undamaged twin
    largest: dict[str, np.ndarray]  # [L, E] largest absolute movement


class Signals:
    """The signals of every expert, [L, E] each, updated after each training step."""

    def __init__(self, model: GPT):
        self.model = model
        self.norm: dict[int, Tensor] = {}  # sums of a step by block: |y|, g |y|
        self.smooth: dict[str, Tensor] = {}
        self.weight: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the experts' outputs in every forward."""

        def hook(block: int) -> Callable[..., None]:
            @torch.no_grad()
            def add(_: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
                plan, weights = inputs[1:]
                norms = weights * output[0].detach().to(weights.dtype).norm(dim=-1)  # [2, S]
                sums = norms.new_zeros(2, len(plan.offsets)).index_add(1, plan.experts.long(), norms)
                self.norm[block] = self.norm.get(block, 0) + sums

            return add

        with contextlib.ExitStack() as stack:
            for block in self.model.config.moe_blocks:
                stack.enter_context(hooked(moe_layer(self.model, block).experts, hook(block)))
            yield

    def after_step(self, twin: Twin, result: StepResult) -> dict[str, Tensor]:
        """The signals after a step, [L, E] float64 on the CPU."""
        trace, loop = result.trace, twin.trained.loop
        tokens = trace.required("kept_per_expert").cpu().double()
        norms, gated_norms = torch.stack([self.norm[block] for block in self.norm], dim=1).cpu().double()
        self.norm = {}
        alone = coherence(trace.required("output"), trace.required("gated_output"), "leave_one_out")
        count, some = tokens.clamp_min(1), tokens > 0
        raw = {"phi_leave_one_out": alone.cpu().double(), "norm": norms / count, "reap": gated_norms / count}
        smooth = {"load": self._smoothed("load", tokens, torch.ones_like(some))}
        smooth |= {name: self._smoothed(name, value, some) for name, value in raw.items()}
        return {f"phi_{clock}": loop.coherence.phi(clock).cpu().double() for clock in ("fast", "mid", "slow")} | smooth

    def _smoothed(self, name: str, value: Tensor, some: Tensor) -> Tensor:
        """The EMA of a signal, without the steps in which an expert had no tokens, corrected for its start at zero."""
        zero = torch.zeros_like(value)
        move = some.double() * (1 - SMOOTHING)
        self.smooth[name] = self.smooth.get(name, zero).lerp(value, move)
        self.weight[name] = self.weight.get(name, zero).lerp(torch.ones_like(value), move)
        return self.smooth[name] / self.weight[name].clamp_min(1e-9)


def assay(name: str, seed: int, twin: Twin, cache: Cache, steps: int) -> list[Moved]:
    """Train the undamaged twin and, for each damage, one twin per layer with a damaged expert, chosen by the seed.

    name: of the run. Raises NotMeasured if step 2 was off, Stopped after a signal.
    """
    model = twin.trained.model
    if not model.config.chrono.coherence:
        raise NotMeasured(f"{name}: --damage needs a run with chrono_coherence=True")
    rng = np.random.default_rng(stream_seed(seed, DAMAGE))
    experts = [int(rng.integers(model.config.n_exp)) for _ in model.config.moe_blocks]
    cases = [("", 0, 0)] + [(damage, *target) for damage in DAMAGES for target in enumerate(experts)]
    known = {(*line["damage"], line["steps"]): line for line in cache.lines if "damage" in line}
    found = []
    for case in tqdm(cases, desc=f"{name}: damage", leave=False, disable=None):
        line = known.get((*case, steps))
        if line is None:
            change, largest = _train(twin, *case, steps, seed)
            line = {"damage": list(case), "steps": steps, "change": change, "largest": largest}
            cache.append(line)
        change, largest = ({k: np.array(v) for k, v in line[name].items()} for name in ("change", "largest"))
        found.append(Moved(*case, change, largest))
    return found


def _train(
    twin: Twin, damage: str, layer: int, expert: int, steps: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Train a twin. Returns `change` and `largest` of Moved, as lists."""
    twin.restart()
    model = twin.trained.model
    signals = Signals(model)
    moves: list[dict[str, Tensor]] = []
    with signals.watching():
        for _ in range(WARMUP):
            before = signals.after_step(twin, twin.step())
        held = _damaged(model, damage, layer, expert, seed) if damage else []
        for _ in range(steps):
            for parameter, value in held:
                parameter.data[expert] = value
            now = signals.after_step(twin, twin.step())
            moves.append({name: _movement(name, before[name], now[name]) for name in SIGNALS})
    of_signal = {name: torch.stack([move[name] for move in moves]) for name in SIGNALS}  # [T, L, E]
    change = {name: move[:, layer, expert].tolist() for name, move in of_signal.items()} if damage else {}
    return change, {name: move.abs().amax(0).tolist() for name, move in of_signal.items()}


def _damaged(model: GPT, damage: str, layer: int, expert: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The weights of the damaged expert: (parameter of all experts, value of this expert)."""
    experts = moe_layer(model, model.config.moe_blocks[layer]).experts
    generator = torch.Generator().manual_seed(stream_seed(seed, DAMAGE, layer))
    changed = WEIGHTS[2:] if damage in OUTPUT_ONLY else WEIGHTS
    held = []
    for name in WEIGHTS:
        parameter = getattr(experts, name)
        if parameter is not None:
            w = parameter.detach()[expert]
            held.append((parameter, DAMAGES[damage](w, generator) if name in changed else w.clone()))
    return held


def _movement(name: str, before: Tensor, now: Tensor) -> Tensor:
    if name not in LOGARITHMIC:
        return now - before
    least = 1.0 if name == "load" else 1e-6
    return (now + least).log() - (before + least).log()


@dataclass(frozen=True)
class Detection:
    """How a signal notices a damage."""

    damage: str
    signal: str
    cases: int  # damaged experts
    detected: float  # share of them, 0 to 1
    delay: float | None  # median number of steps until the alarm; None if half of them or more are not detected
    accused: float  # share of the healthy experts of the same layer
    accused_elsewhere: float | None  # of the other layers; None without other layers


def detections(runs: list[list[Moved]]) -> list[Detection]:
    """Detections by damage and signal, over the assays of all runs."""
    found = []
    for damage in DAMAGES:
        for signal in SIGNALS:
            delays, same, elsewhere = [], [], []
            for i, moved in enumerate(runs):
                limit = threshold([other for j, other in enumerate(runs) if j != i or len(runs) == 1], signal)
                for m in (m for m in moved if m.damage == damage):
                    over = np.abs(m.change[signal]) > limit
                    delays.append(int(over.argmax()) + 1 if over.any() else np.inf)
                    alarms = m.largest[signal] > limit
                    healthy = np.ones(alarms.shape, dtype=bool)
                    healthy[m.layer, m.expert] = False
                    same.append(alarms[m.layer][healthy[m.layer]].mean())
                    others = np.delete(alarms, m.layer, axis=0)
                    if others.size:
                        elsewhere.append(others.mean())
            median, detected = float(np.median(delays)), float(np.isfinite(delays).mean())
            delay = median if np.isfinite(median) else None
            accused = float(np.mean(same)), float(np.mean(elsewhere)) if elsewhere else None
            found.append(Detection(damage, signal, len(delays), detected, delay, *accused))
    return found


def threshold(runs: list[list[Moved]], signal: str) -> float:
    """The movement that FALSE_ALARMS of the experts of undamaged twins exceed."""
    largest = [m.largest[signal].ravel() for moved in runs for m in moved if not m.damage]
    return float(np.quantile(np.concatenate(largest), 1 - FALSE_ALARMS, method="higher"))
