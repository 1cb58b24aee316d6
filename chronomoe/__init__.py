"""The closed loop coherence -> beta -> routing -> coherence for mixture-of-experts layers.

One file per step of the loop: router.py (step 1), coherence.py (step 2), beta.py (step 3), bridge.py (step 4),
lifecycle.py (step 5). signals.py has what beta can follow. statistics.py reduces what the routers did to the sums of a
MoETrace (trace.py), loop.py updates all state from it, metrics.py names what is logged, schedule.py reads values by
step, fuse.py compiles small operators. This package imports torch only: no trainer, no model.
"""

from chronomoe.attach import attach
from chronomoe.beta import update_beta
from chronomoe.bridge import compute_flip_rate, compute_js_divergence, compute_relevance
from chronomoe.coherence import CoherenceBuffer, CoherenceState
from chronomoe.config import ChronoConfig
from chronomoe.fuse import fusion
from chronomoe.lifecycle import LifecycleCoordinator, PruneDecision
from chronomoe.loop import ChronoLoop
from chronomoe.router import ChronoRouter, RouterBias, RouterState, Routing
from chronomoe.statistics import collect_trace
from chronomoe.trace import MoETrace

__version__ = "0.1.0"

__all__ = [
    "ChronoConfig",
    "ChronoLoop",
    "ChronoRouter",
    "CoherenceBuffer",
    "CoherenceState",
    "LifecycleCoordinator",
    "MoETrace",
    "PruneDecision",
    "RouterBias",
    "RouterState",
    "Routing",
    "attach",
    "collect_trace",
    "compute_flip_rate",
    "compute_js_divergence",
    "compute_relevance",
    "fusion",
    "update_beta",
]
