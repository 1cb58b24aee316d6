"""The arms of a comparison: the settings that define each.

`off` measures everything and leaves beta at 0. `on` is the closed loop. Every other arm is named after the signal that
beta follows (chronomoe/signals.py). `shuffled` is a placebo: the beta of each expert follows the coherence of another
expert. `frozen` needs `chrono_spread`.

`load` updates beta from load instead of coherence, as torchtitan updates the bias of auxiliary-loss-free load balancing
(arXiv 2408.15664): rate times the sign of the load error, minus the mean over experts. It uses no auxiliary loss, no
bridge, clean gates, and a clamp that beta does not reach. It differs from DeepSeek-V3, where the rate of 1e-3 is in
units of sigmoid scores and a small sequence-wise loss is added; here the rate is in units of logit_std of softmax
logits, and there is no such loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chronomoe.signals import SIGNALS
from trainer.errors import UserError

CUSTOM = "custom"  # the arm of a run whose settings match no other arm
ARMS: dict[str, dict[str, Any]] = {
    "off": {"chrono_beta": False},
    "on": {"chrono_beta": True, "chrono_signal": "coherence"},
    **{signal: {"chrono_beta": True, "chrono_signal": signal} for signal in SIGNALS if signal != "coherence"},
}
ARMS["load"] |= {
    "chrono_gates": "clean",
    "chrono_eta": 1e-3,
    "chrono_k_max": 10.0,
    "chrono_bridge": False,
    "use_aux_loss": False,
}
DEFAULT_ARMS = ("off", "on", "shuffled", "load")  # of a study that does not name its arms


def contradiction(arm: str, values: Mapping[str, Any]) -> str | None:
    """The first key whose value differs from the one that defines the arm, or None."""
    return next((key for key, value in ARMS.get(arm, {}).items() if values.get(key) != value), None)


def check_arm(arm: str, values: Mapping[str, Any]) -> None:
    """Raises UserError if a value differs from the one that defines the arm."""
    key = contradiction(arm, values)
    if key is not None:
        raise UserError(
            f"{key}={values.get(key)!r}, but arm={arm!r} means {key}={ARMS[arm][key]!r}: leave one of them out"
        )


def arm_of(values: Mapping[str, Any]) -> str:
    """The arm that these settings define, or 'custom'."""
    return next((arm for arm in ARMS if contradiction(arm, values) is None), CUSTOM)
