"""Step 2: coherence, the cosine between an expert's output and its layer's output.

    phi_e = cos(sum of y_e over the expert's tokens, sum of the mixture over all tokens)

The mixture is sum_e g_e y_e, before the residual. A cosine ignores length, so sums over tokens replace means, and they
add over micro-batches and ranks. With reference 'leave_one_out' the expert's own part g_e y_e is subtracted from the
mixture. phi is smoothed by three EMAs, corrected for their start at zero: phi / (1 - alpha^n) after n updates.

Coherence with the mixture rewards large outputs: an expert whose outputs are noise, three times too large, dominates
the mixture that it is compared with. 'leave_one_out' does not have this flaw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chronomoe.state import StateModule, debiased, update_ema
from chronomoe.trace import MoETrace

if TYPE_CHECKING:  # config.py imports the signals, which import this file
    from chronomoe.config import ChronoConfig

CLOCKS = ("fast", "mid", "slow")


@dataclass(frozen=True)
class CoherenceState:
    """One expert's coherence on the host. phi is None before the first token."""

    expert_id: str  # "L0_E3": transformer block 0, expert 3
    layer_id: int  # transformer block
    phi_fast: float | None
    phi_mid: float | None
    phi_slow: float | None
    last_update_step: int  # -1 before the first token
    total_tokens_seen: int
    is_being_observed: bool


def coherence(output: Tensor, gated_output: Tensor, reference: str) -> Tensor:
    """phi [..., E], -1 to 1, from sums over tokens of y_e and g_e y_e [..., E, D].

    0 where a direction is undefined: no tokens, or a reference of length zero.
    """
    target = gated_output.sum(-2, keepdim=True)
    if reference == "leave_one_out":
        target = target - gated_output
    lengths = output.norm(dim=-1) * target.norm(dim=-1)
    return (output * target).sum(-1) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


class CoherenceBuffer(StateModule):
    """The three EMAs of phi and the counts of observations, for all L layers, on the device.

    Use `phi` to read the EMAs.
    """

    phi_fast: Tensor  # [L, E] EMA of phi, not corrected for its start at zero
    phi_mid: Tensor  # [L, E]
    phi_slow: Tensor  # [L, E]
    update_count: Tensor  # [L, E] int64
    total_tokens_seen: Tensor  # [L, E] int64
    last_update_step: Tensor  # [L, E] int64, -1 before the first token
    step: Tensor  # [] int64, number of steps taken

    def __init__(self, num_layers: int, num_experts: int, config: ChronoConfig):
        super().__init__()
        self.config = config
        shape = (num_layers, num_experts)
        for clock in CLOCKS:
            self.register_buffer(f"phi_{clock}", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("update_count", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("total_tokens_seen", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("last_update_step", torch.full(shape, -1, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, trace: MoETrace, ok: Tensor) -> None:
        """Update the experts that received tokens. Where `ok` [] bool is False only `step` advances."""
        self.step += 1
        output, gated_output = trace.required("output"), trace.required("gated_output")
        kept_per_expert = trace.required("kept_per_expert")
        phi_raw = coherence(output, gated_output, self.config.reference)
        active = ok & (kept_per_expert > 0) & (phi_raw.abs() < torch.inf)
        phi_raw = torch.where(active, phi_raw, 0.0)
        for clock in CLOCKS:
            update_ema(getattr(self, f"phi_{clock}"), phi_raw, active, getattr(self.config, f"alpha_{clock}"))
        self.update_count += active
        self.total_tokens_seen += (kept_per_expert * active).long()
        self.last_update_step.copy_(torch.where(active, self.step, self.last_update_step))

    def phi(self, clock: str) -> Tensor:
        """phi [L, E] of the clock 'fast', 'mid' or 'slow', -1 to 1; 0 for experts never observed."""
        ema = getattr(self, f"phi_{clock}")
        if not self.config.ema_debias:
            return ema
        return debiased(ema, self.update_count, getattr(self.config, f"alpha_{clock}"))

    def ever_observed(self) -> Tensor:
        """[L, E] bool: the expert has received a token."""
        return self.update_count > 0

    def updated(self) -> Tensor:
        """[L, E] bool: the expert's phi was updated in the last step."""
        return self.last_update_step == self.step

    def observed(self) -> Tensor:
        """[L, E] bool: the expert has received a token within the last `window` steps."""
        return self.ever_observed() & (self.step - self.last_update_step < self.config.window)

    def layer_phi(self, phi_slow: Tensor | None = None) -> Tensor:
        """Token-weighted mean of phi_slow over each layer's experts, [L]; 0 before the first token.

        phi_slow [L, E]: optional; avoids recomputing it.
        """
        phi_slow = self.phi("slow") if phi_slow is None else phi_slow
        tokens = self.total_tokens_seen.to(phi_slow.dtype)
        return (phi_slow * tokens).sum(-1) / tokens.sum(-1).clamp_min(1)

    def starving(self, phi_slow: Tensor | None = None) -> Tensor:
        """[L] bool: layer_phi is below `starving_phi`. phi_slow [L, E]: optional; avoids recomputing it."""
        return self.layer_phi(phi_slow) < self.config.starving_phi
