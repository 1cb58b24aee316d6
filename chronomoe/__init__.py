"""The closed loop coherence -> beta -> routing -> coherence for mixture-of-experts layers.

Step 1 router.py, step 2 coherence.py, step 3 beta.py, step 4 bridge.py, step 5 lifecycle.py; loop.py ties them,
statistics.py sums up what the forward saw into trace.py's MoETrace, and dispatch.py moves tokens to experts and back.
Nothing here knows of a trainer or of a particular model.
"""

from chronomoe.beta import update_beta
from chronomoe.bridge import compute_flip_rate, compute_js_divergence, compute_relevance
from chronomoe.coherence import CoherenceBuffer, CoherenceState
from chronomoe.config import ChronoConfig
from chronomoe.lifecycle import LifecycleCoordinator, PruneDecision
from chronomoe.loop import ChronoLoop
from chronomoe.router import ChronoRouter, RouterBias, RouterState, Routing
from chronomoe.statistics import collect_trace
from chronomoe.trace import MoETrace

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
    "collect_trace",
    "compute_flip_rate",
    "compute_js_divergence",
    "compute_relevance",
    "update_beta",
]
