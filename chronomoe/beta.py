"""Step 3: a signal moves beta.

    beta_coeff <- clamp(beta_coeff + s * drift, -s * k_max, s * k_max)
    drift = eta * (phi_slow - tau)     for experts whose phi was updated in this step, else 0   (signal 'coherence')

Coherent experts are chosen more often. Softmax ignores a shift that is common to all experts of a layer, so only
differences of beta change routing. `center` subtracts the layer's mean drift, and tau then cancels.

Beta drifts at every training step. Only experts that were observed in this step drift: without new tokens phi is
frozen, and its drift would run into the clamp.

signals.py has the other signals. s is the strength, 0 to 1, that `ramp` sets for this step; 1 without a ramp.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from chronomoe.coherence import CoherenceBuffer
from chronomoe.router import RouterState
from chronomoe.signals import SIGNALS, SignalState
from chronomoe.trace import MoETrace


@torch.no_grad()
def update_beta(
    router_state: RouterState,
    coherence: CoherenceBuffer,
    ok: Tensor,
    trace: MoETrace,
    signals: SignalState,
    strength: Tensor | None = None,
    phi_slow: Tensor | None = None,
) -> None:
    """Move beta by one step of the configured signal, in place.

    Args:
        router_state: its beta_coeff [L, E] is updated; its config names the signal.
        coherence: read for phi_slow and for which experts were updated in this step.
        ok: [] bool; where it is False nothing changes.
        trace: this step's trace, reduced over ranks.
        signals: read for the smoothed score of this step.
        strength: [], factor of eta and k_max, 0 to 1; None: 1.
        phi_slow: [L, E], optional; avoids recomputing it.
    """
    config, beta = router_state.config, router_state.beta_coeff
    phi_slow = coherence.phi("slow") if phi_slow is None else phi_slow
    seen = signals.observation(beta, coherence, phi_slow, trace.required("tokens_per_expert"))
    drift = SIGNALS[config.signal].drift(config, seen)
    if strength is None:
        beta.add_(drift * ok).clamp_(-config.k_max, config.k_max)
        return
    bound = config.k_max * strength
    beta.copy_(torch.where(ok, (beta + drift * strength).clamp(-bound, bound), beta))


def strength_at(ramp: Sequence[tuple[float, int]], step: Tensor) -> Tensor:
    """The factor of eta and k_max at training step `step` [] int64: [] float32, linear between the ramp's points."""
    strength = torch.full_like(step, ramp[0][0], dtype=torch.float32)
    for (before, start), (after, end) in pairwise(ramp):
        share = ((step - start).float() / (end - start)).clamp(0, 1)
        strength = torch.where(step >= start, before + (after - before) * share, strength)
    return strength
