"""The arms of a study: settings that differ from the config in what drives beta, and in nothing else.

`shuffled` is a placebo: each expert's beta follows another expert's coherence. `load` is the published alternative, the
bias that balances load (https://arxiv.org/abs/2408.15664), as published: without auxiliary loss, choosing experts but
not weighing them, at its own rate, without bridge and with a clamp that it does not reach.
"""

from __future__ import annotations

from typing import Any

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


def arm_of(config: dict[str, Any]) -> str:
    """The arm that a run's settings belong to: what drives its beta."""
    if not config.get("chrono_beta"):
        return "off"
    signal = config.get("chrono_signal", "coherence")
    return "on" if signal == "coherence" else signal
