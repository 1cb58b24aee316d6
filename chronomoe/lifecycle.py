"""Step 5: propose experts to prune. Proposals are reported; nothing is pruned.

low_observability   after `unused_after` steps: fewer than `unused_tokens` tokens in total, or none for `window`
                    steps; not in a starving layer (token-weighted mean phi_slow below `starving_phi`)
low_coherence       phi_slow below `prune_phi`, with more than `prune_min_tokens` tokens and more than
                    `prune_min_updates` updates
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe.coherence import CoherenceBuffer
from chronomoe.config import ChronoConfig
from chronomoe.state import StateModule

REASONS = ("low_observability", "low_coherence")


@dataclass(frozen=True)
class PruneDecision:
    """A candidate that opened or was withdrawn."""

    expert_id: str  # "L0_E3": transformer block 0, expert 3
    reason: str  # one of REASONS
    action: str  # "open" or "withdrawn"
    step: int  # step at which it opened or was withdrawn
    phi_slow: float | None  # at the time of the report
    total_tokens_seen: int  # at the time of the report


class LifecycleCoordinator(StateModule):
    """Applies the prune rules at each step on the device and stores which candidates are open.

    A candidate that opens and is withdrawn between two reports is not reported.
    """

    # the first dimension is that of REASONS
    open: Tensor  # [2, L, E] bool
    since: Tensor  # [2, L, E] int64, step of the last change
    reported: Tensor  # [2, L, E] bool, value of `open` at the last report

    def __init__(self, num_layers: int, num_experts: int, config: ChronoConfig):
        super().__init__()
        self.config = config
        shape = (len(REASONS), num_layers, num_experts)
        self.register_buffer("open", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("since", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("reported", torch.zeros(shape, dtype=torch.bool))

    def evaluate(self, coherence: CoherenceBuffer, phi_slow: Tensor | None = None) -> Tensor:
        """Which experts meet each prune rule at this step: [2, L, E] bool.

        phi_slow [L, E]: optional; avoids recomputing it.
        """
        config = self.config
        phi_slow = coherence.phi("slow") if phi_slow is None else phi_slow
        few = coherence.total_tokens_seen < config.unused_tokens
        silent = coherence.step - coherence.last_update_step >= config.window
        unused = (few | silent) & (coherence.step >= config.unused_after) & ~coherence.starving(phi_slow).unsqueeze(-1)
        incoherent = (
            (phi_slow < config.prune_phi)
            & (coherence.total_tokens_seen > config.prune_min_tokens)
            & (coherence.update_count > config.prune_min_updates)
        )
        return torch.stack([unused, incoherent])

    @torch.no_grad()
    def update(self, coherence: CoherenceBuffer, phi_slow: Tensor | None = None) -> None:
        """Open and withdraw candidates by the rules at this step. phi_slow: as in `evaluate`."""
        now = self.evaluate(coherence, phi_slow)
        self.since.copy_(torch.where(now != self.open, coherence.step, self.since))
        self.open.copy_(now)

    def candidates(self) -> Tensor:
        """Number of experts with an open candidate: [] int64."""
        return self.open.any(0).sum()
