"""Settings of the loop: which of the five steps are on, and their constants.

`python train.py --help` lists them with the prefix `chrono_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chronomoe.options import check_options, option
from chronomoe.schedule import parse_ramp
from chronomoe.signals import SIGNALS

THRESHOLDS = {"js": 0.2, "overlap": 0.1}  # default of bridge_threshold, by bridge_signal
STEPS = ("router", "coherence", "beta", "bridge", "lifecycle")

# step -> the steps whose results it uses
NEEDS = {
    "beta": ("router", "coherence"),
    "bridge": ("router",),
    "lifecycle": ("coherence",),
}


def missing_steps(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs (step, needed step) where the first is on and the second is off."""
    return [(step, needed) for step, needs in NEEDS.items() for needed in needs if values[step] and not values[needed]]


@dataclass(frozen=True)
class ChronoConfig:
    """Switches and constants of the loop.

    Raises ValueError for a wrong type, a value out of range, or a step whose needed steps are off.
    """

    router: bool = option(
        False, "step 1: add beta to the routing logits, measure clean against biased routing", group="Steps of the loop"
    )
    coherence: bool = option(False, "step 2: track each expert's coherence with its layer")
    beta: bool = option(False, "step 3: let coherence move beta (needs steps 1 and 2)")
    bridge: bool = option(
        False, "step 4: weaken beta where it disagrees with the router (needs step 1)", only_with="beta"
    )
    lifecycle: bool = option(False, "step 5: propose prunes, execute none (needs step 2)", role="logging")

    signal: str = option(
        "coherence",
        f"what beta follows: {'; '.join(f'{name!r}, {signal.what}' for name, signal in SIGNALS.items())}",
        choices=tuple(SIGNALS),
        only_with="beta",
        group="Beta (step 3)",
    )
    k_max: float = option(0.3, "bound of beta on either side, in units of logit_std", least=0, only_with="beta")
    eta: float = option(1e-4, "drift of beta per step, per unit of (phi_slow - tau)", least=0, only_with="beta")
    tau: float = option(0.5, "coherence at which beta does not move", least=-1, most=1, only_with="beta")
    center: bool = option(
        False, "subtract the layer's mean drift, so that beta moves only by differences", only_with="beta"
    )
    ramp: str = option(
        "",
        "strength of beta by step, as '0@0 1@300 0@600': eta and k_max are multiplied by the value, 0 to 1, which is "
        "linear between these points; empty: 1",
        only_with="beta",
    )
    spread: float | None = option(
        None,
        "signal 'frozen': standard deviation of beta in a layer, for example the beta/std at which arm 'on' ends",
        least=0,
        only_with="signal=frozen",
    )
    gates: str = option(
        "biased",
        "'biased': beta affects choice and gates; 'clean': only the choice",
        choices=("biased", "clean"),
        only_with="beta",
    )

    logit_std_alpha: float = option(
        0.99,
        "EMA factor of logit_std",
        least=0,
        below=1,
        only_with="router",
        group="Measurements (steps 1 and 2)",
    )
    alpha_fast: float = option(0.9, "EMA factor of phi_fast", least=0, below=1, only_with="coherence")
    alpha_mid: float = option(0.99, "EMA factor of phi_mid", least=0, below=1, only_with="coherence")
    alpha_slow: float = option(0.999, "EMA factor of phi_slow", least=0, below=1, only_with="coherence")
    ema_debias: bool = option(True, "correct the phi EMAs for their start at zero", only_with="coherence")

    reference: str = option(
        "mixture",
        "what an expert's output is compared with; 'leave_one_out' subtracts the expert's own part",
        choices=("mixture", "leave_one_out"),
        only_with="coherence",
    )
    window: int = option(
        1000,
        "low_observability: steps without a token after which an expert is unobserved",
        least=1,
        only_with="coherence",
        role="logging",
    )

    bridge_signal: str = option(
        "js",
        "disagreement that the bridge reads",
        choices=("js", "overlap"),
        only_with="bridge",
        group="Bridge (step 4)",
    )
    bridge_threshold: float | None = option(
        None,
        "disagreement up to which beta is applied in full; three times this switches beta off; None: 0.2 for 'js', "
        "0.1 for 'overlap'",
        only_with="bridge",
        above=0,
    )
    bridge_scope: str = option(
        "batch",
        "'batch': one relevance per layer, from the last step; 'token': one per token, from itself",
        choices=("batch", "token"),
        only_with="bridge",
    )

    prune_phi: float = option(
        0.3,
        "low_coherence: phi_slow below this",
        least=-1,
        most=1,
        only_with="lifecycle",
        role="logging",
        group="Lifecycle (step 5)",
    )
    prune_min_tokens: int = option(
        1000, "low_coherence: only with more tokens than this", least=0, only_with="lifecycle", role="logging"
    )
    prune_min_updates: int = option(
        100, "low_coherence: only with more updates than this", least=0, only_with="lifecycle", role="logging"
    )
    unused_tokens: int = option(
        100, "low_observability: fewer tokens than this in total", least=0, only_with="lifecycle", role="logging"
    )
    unused_after: int = option(
        1000, "low_observability: not before this many steps", least=0, only_with="lifecycle", role="logging"
    )
    starving_phi: float = option(
        0.5,
        "a layer with a token-weighted mean phi_slow below this keeps its unused experts",
        least=-1,
        most=1,
        only_with="coherence",
        role="logging",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for step, needed in missing_steps(vars(self)):
            raise ValueError(f"{step}=True needs {needed}=True")
        if self.signal == "frozen" and self.beta and self.spread is None:
            raise ValueError("signal='frozen' needs spread, for example the beta/std at which arm 'on' ends")
        if self.measures("first_order") and not self.router:
            raise ValueError("signal='first_order' needs router=True")
        if self.ramp:
            if self.signal == "frozen":
                raise ValueError("ramp changes eta and k_max, and signal='frozen' does not use eta")
            try:
                parse_ramp(self.ramp)
            except ValueError as e:
                raise ValueError(f"ramp: {e}") from None

    @property
    def disagreement_threshold(self) -> float:
        """bridge_threshold; the default of bridge_signal if that is None."""
        return THRESHOLDS[self.bridge_signal] if self.bridge_threshold is None else self.bridge_threshold

    def measures(self, field: str) -> bool:
        """Whether the signal needs this field of MoETrace."""
        return self.coherence and SIGNALS[self.signal].needs == field

    def steps_on(self) -> list[str]:
        """The steps that are on, in order."""
        return [step for step in STEPS if getattr(self, step)]
