"""The update that closes the loop, once after each optimizer step, on the device.

    sums of the forward -> logit_std, disagreement -> r         steps 1 and 4
                        -> phi                                  step 2
                           phi -> beta                          step 3
                           phi, tokens -> prune candidates      step 5

All state is stacked over layers, so the update launches the same number of kernels for any number of layers. It never
synchronizes with the device; only `read`, `report` and `snapshot` copy state to the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from chronomoe.beta import strength_at, update_beta
from chronomoe.coherence import CLOCKS, CoherenceBuffer, CoherenceState
from chronomoe.fuse import fused
from chronomoe.lifecycle import REASONS, LifecycleCoordinator, PruneDecision
from chronomoe.metrics import expert_id, layer_metric, metrics
from chronomoe.router import RouterState
from chronomoe.schedule import parse_ramp
from chronomoe.signals import SignalState
from chronomoe.state import widened
from chronomoe.trace import MoETrace


class ChronoLoop:
    """Updates the state that the next forward reads, from the trace of the last one.

    Args:
        router_state: the model's; its config says which steps are on.
        layer_ids: index of the transformer block of each of the L MoE layers, used in names ("L0_E3").
        seed: of the random numbers of the signals.

    The state is on router_state's device. `state_dict` holds the loop's state without router_state, which is in the
    model's own state dict.

    Raises ValueError unless layer_ids has one index per layer of router_state.
    """

    def __init__(self, router_state: RouterState, layer_ids: list[int], seed: int = 0):
        self.config = router_state.config
        self.router_state = router_state
        self.layer_ids = list(layer_ids)
        num_layers, num_experts = router_state.beta_coeff.shape
        if len(self.layer_ids) != num_layers:
            raise ValueError(f"layer_ids={self.layer_ids} must name the {num_layers} layers of router_state")
        device = router_state.beta_coeff.device
        self.coherence = CoherenceBuffer(num_layers, num_experts, self.config).to(device)
        self.lifecycle = LifecycleCoordinator(num_layers, num_experts, self.config).to(device)
        self.signals = SignalState(num_layers, num_experts, self.config, seed).to(device)
        self.ramp = parse_ramp(self.config.ramp) if self.config.ramp else []
        self.last: MoETrace | None = None
        # training step at which the loop's own count of steps began: not 0 if step 2 was switched on later
        self.began_at = 0

    @torch.no_grad()
    def step(self, trace: MoETrace, found_inf: Tensor | None = None) -> None:
        """Update all state from one optimizer step's trace, summed over its micro-batches. Every rank calls this.

        found_inf: [] tensor, nonzero if loss or gradient was not finite. The optimizer step was skipped, and so is its
        observation.

        Raises ValueError if the trace is of other layers or experts, or lacks a field that a step needs.
        """
        trace.check(*self.router_state.beta_coeff.shape)
        trace = self.collect(trace)
        self._update(trace, found_inf)
        self.last = trace

    @torch.no_grad()
    def collect(self, trace: MoETrace, loss_scale: Tensor | None = None) -> MoETrace:
        """Add to the trace what backward has measured since the last call, and sum it over ranks.

        Returns the trace itself if this was done before. loss_scale: [], the factor of the loss in backward.
        """
        probe = self.router_state.probe
        if not trace.is_reduced and probe is not None and trace.first_order is None:
            if probe.grad is None:
                raise ValueError("signal 'first_order' needs a backward before the step")
            sums = probe.grad.clone() if loss_scale is None else probe.grad / loss_scale
            trace = replace(trace, first_order=sums)
            probe.grad.zero_()  # in place: a CUDA graph writes to its address
        return trace.summed_over_ranks()

    @torch.no_grad()
    def set_worth(self, worth: Tensor) -> None:
        """Set what signal 'worth' follows from now on: the worth of every expert, [L, E], the same on all ranks."""
        self.signals.worth.copy_(worth)

    @torch.no_grad()
    @fused
    def _update(self, trace: MoETrace, found_inf: Tensor | None) -> None:
        config = self.config
        ok = trace.cross_entropy < torch.inf  # False for NaN and infinity
        if found_inf is not None:
            ok = ok & (found_inf == 0)
        if config.router:
            self.router_state.update(trace, ok)
        phi_slow = None
        if config.coherence:
            self.coherence.update(trace, ok)
            phi_slow = self.coherence.phi("slow")
            self.signals.update(trace, self.coherence.updated(), ok)
        if config.beta:
            update_beta(self.router_state, self.coherence, ok, trace, self.signals, self.strength(), phi_slow)
        if config.lifecycle:
            self.lifecycle.update(self.coherence, phi_slow)

    def strength(self) -> Tensor | None:
        """The factor of eta and k_max in the last step, []; None without a ramp."""
        return strength_at(self.ramp, self.coherence.step + self.began_at) if self.ramp else None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {
            "coherence": self.coherence.state_dict(),
            "lifecycle": self.lifecycle.state_dict(),
            "signals": self.signals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.coherence.load_state_dict(state["coherence"])
        self.lifecycle.load_state_dict(state["lifecycle"])
        self.signals.load_state_dict(state["signals"])

    def snapshot(self) -> dict[tuple[int, int], CoherenceState]:
        """Every expert's coherence on the host, by (transformer block, expert). Synchronizes with the device."""
        c = self.coherence
        phis = torch.stack([c.phi(clock) for clock in CLOCKS], dim=-1).tolist()
        seen = torch.stack([c.last_update_step, c.total_tokens_seen, c.observed().long()], dim=-1).tolist()
        states = {}
        for layer, block in enumerate(self.layer_ids):
            for expert, (last, tokens, observed) in enumerate(seen[layer]):
                fast, mid, slow = phis[layer][expert] if last >= 0 else [None] * len(CLOCKS)
                states[block, expert] = CoherenceState(
                    expert_id(block, expert), block, fast, mid, slow, last, tokens, bool(observed)
                )
        return states

    @torch.no_grad()
    def report(self) -> list[PruneDecision]:
        """Candidates opened or withdrawn since the last report, ordered by step. Synchronizes with the device."""
        if not self.config.lifecycle:
            return []
        life = self.lifecycle
        changed = (life.open != life.reported).nonzero().tolist()
        if not changed:
            return []
        states, since, is_open = self.snapshot(), life.since.tolist(), life.open.tolist()
        life.reported.copy_(life.open)
        decisions = []
        for reason, layer, expert in changed:
            state = states[self.layer_ids[layer], expert]
            decisions.append(
                PruneDecision(
                    expert_id=state.expert_id,
                    reason=REASONS[reason],
                    action="open" if is_open[reason][layer][expert] else "withdrawn",
                    step=self.began_at + since[reason][layer][expert],
                    phi_slow=state.phi_slow,
                    total_tokens_seen=state.total_tokens_seen,
                )
            )
        return sorted(decisions, key=lambda d: d.step)

    @torch.no_grad()
    def read(self) -> dict[str, float | None]:
        """The last step's metrics by name; None for a value that does not exist. Synchronizes with the device."""
        if self.last is None:
            return {}
        found = metrics(self.last, self.router_state, self.coherence, self.lifecycle, self.signals, self.strength())
        tensors = [*found.per_layer.values(), *found.per_expert.values(), *found.scalars.values()]
        if not tensors:
            return {}
        host = iter(torch.cat([widened(x).reshape(-1) for x in tensors]).tolist())  # one copy to the host
        num_experts = self.router_state.beta_coeff.shape[1]
        values: dict[str, float | None] = {}
        for name in found.per_layer:
            values |= {layer_metric(name, block): next(host) for block in self.layer_ids}
        for name in found.per_expert:
            for block in self.layer_ids:
                values |= {f"expert/{expert_id(block, e)}/{name}": next(host) for e in range(num_experts)}
        values |= {name: next(host) for name in found.scalars}
        return {name: None if value != value else value for name, value in values.items()}
