"""The arms of a comparison: the settings that define each.

`off` measures everything and leaves beta at 0. `on` is the closed loop. `shuffled` is a placebo: the beta of each
expert follows the coherence of another expert. `load` drives beta by load instead of coherence, by torchtitan's update
of the auxiliary-loss-free bias (arXiv 2408.15664): rate times the sign of the load error, less its mean. It has no
auxiliary loss, no bridge, clean gates and a clamp that it does not reach. It is not the form that DeepSeek-V3
published: there the rate of 1e-3 is in units of sigmoid scores, here in units of logit_std on the logits of a softmax,
and the small sequence-wise loss is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CUSTOM = "custom"  # a run whose settings are those of no arm
ARMS: dict[str, dict[str, Any]] = {
    "off": {"chrono_beta": False},
    "on": {"chrono_beta": True, "chrono_signal": "coherence"},
    "shuffled": {"chrono_beta": True, "chrono_signal": "shuffled"},
    "load": {
        "chrono_beta": True,
        "chrono_signal": "load",
        "chrono_gates": "clean",
        "chrono_eta": 1e-3,
        "chrono_k_max": 10.0,
        "chrono_bridge": False,
        "use_aux_loss": False,
    },
}


def contradiction(arm: str, values: Mapping[str, Any]) -> str | None:
    """The first key whose value is not the one that defines the arm, or None."""
    return next((key for key, value in ARMS.get(arm, {}).items() if values.get(key) != value), None)


def arm_of(values: Mapping[str, Any]) -> str:
    """The arm that a run's settings define, or 'custom'."""
    return next((arm for arm in ARMS if contradiction(arm, values) is None), CUSTOM)
