"""The step that closes the loop, once after each optimizer step, on the device.

    sums of the forward -> logit_std, disagreement -> r         steps 1 and 4
                        -> phi                                  step 2
                           phi -> beta                          step 3
                           phi, tokens -> prune candidates      step 5

All state is stacked over layers, so a step costs the same handful of kernels however many layers there are, and nothing
in it waits for the device. `ChronoLoop.read` is the one place that copies state to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chronomoe.beta import derangement, update_beta, update_beta_from_load
from chronomoe.coherence import CLOCKS, CoherenceBuffer, CoherenceState
from chronomoe.lifecycle import REASONS, LifecycleCoordinator, PruneDecision
from chronomoe.router import RouterState
from chronomoe.state import widened
from chronomoe.trace import MoETrace


class ChronoLoop:
    """Ties the forward's trace to the state that the next forward reads.

    Args:
        router_state: the model's; its config says which steps are on.
        layer_ids: for each of the L MoE layers the index of its transformer block, used in names ("L0_E3").
        seed: of the permutation that signal 'shuffled' uses.

    The state lives on router_state's device. `state_dict` holds what the loop owns beside router_state, which the
    model's own state dict holds.
    """

    def __init__(self, router_state: RouterState, layer_ids: list[int], seed: int = 0):
        self.config = router_state.config
        self.router_state = router_state
        self.layer_ids = list(layer_ids)
        num_layers, num_experts = router_state.beta_coeff.shape
        device = router_state.beta_coeff.device
        self.coherence = CoherenceBuffer(num_layers, num_experts, self.config).to(device)
        self.lifecycle = LifecycleCoordinator(num_layers, num_experts, self.config).to(device)
        self.follows = derangement(num_layers, num_experts, seed).to(device)
        self.last: MoETrace | None = None
        # The trainer's step at which this loop's count began: not 0 where coherence is switched on in mid-training.
        self.began_at = 0

    @torch.no_grad()
    def step(self, trace: MoETrace, found_inf: Tensor | None = None) -> None:
        """Take in one optimizer step's trace, summed over its micro-batches; with ranks, every rank calls this.

        found_inf: [] tensor, nonzero where the gradient was not finite: the step was skipped, so is its observation.
        """
        trace = trace.summed_over_ranks()
        self._update(trace, found_inf)
        self.last = trace

    def compile(self, **options) -> None:
        """Fuse the step's kernels by torch.compile, which takes the options, from its next call on."""
        self._update = torch.compile(self._update, fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def _update(self, trace: MoETrace, found_inf: Tensor | None) -> None:
        config = self.config
        ok = trace.cross_entropy < torch.inf  # not where it is no number, and below 0 it cannot be
        if found_inf is not None:
            ok = ok & (found_inf == 0)
        if config.router:
            self.router_state.update(trace, ok)
        phi_slow = None
        if config.coherence:
            self.coherence.update(trace, ok)
            phi_slow = self.coherence.phi("slow")
        if config.beta and config.signal == "load":
            update_beta_from_load(self.router_state, trace.chosen, ok)
        elif config.beta:
            follows = self.follows if config.signal == "shuffled" else None
            update_beta(self.router_state, self.coherence, ok, follows, phi_slow)
        if config.lifecycle:
            self.lifecycle.update(self.coherence, phi_slow)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {
            "coherence": self.coherence.state_dict(),
            "lifecycle": self.lifecycle.state_dict(),
            "shuffled": {"follows": self.follows},
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.coherence.load_state_dict(state["coherence"])
        self.lifecycle.load_state_dict(state["lifecycle"])
        self.follows.copy_(state["shuffled"]["follows"])

    def snapshot(self) -> dict[tuple[int, int], CoherenceState]:
        """Every expert's coherence for people, keyed by (transformer block, expert). Waits for the device."""
        c = self.coherence
        phis = torch.stack([c.phi(clock) for clock in CLOCKS], dim=-1).tolist()
        seen = torch.stack([c.last_update_step, c.total_tokens_seen, c.observed().long()], dim=-1).tolist()
        states = {}
        for layer, block in enumerate(self.layer_ids):
            for expert, (last, tokens, observed) in enumerate(seen[layer]):
                phi = phis[layer][expert] if last >= 0 else [None] * len(CLOCKS)
                states[block, expert] = CoherenceState(
                    expert_id(block, expert), block, *phi, last, tokens, bool(observed)
                )
        return states

    @torch.no_grad()
    def report(self) -> list[PruneDecision]:
        """Candidates opened or withdrawn since the last report, in the order of their steps. Waits for the device."""
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
        """The last step's numbers by their metric names, None where there is nothing to tell. Waits for the device."""
        if self.last is None or self.last.chosen is None:
            return {}
        per_layer, per_expert, alone = self._numbers()
        tensors = (*per_layer.values(), *per_expert.values(), *alone.values())
        flat = torch.cat([widened(x).reshape(-1) for x in tensors]).tolist()

        values: dict[str, float | None] = {}
        num_experts = self.router_state.beta_coeff.shape[1]
        place = 0
        for name in per_layer:
            group, metric = name.split("/")
            for block in self.layer_ids:
                values[f"{group}/L{block}/{metric}"] = flat[place]
                place += 1
        for metric in per_expert:
            for block in self.layer_ids:
                for expert in range(num_experts):
                    values[f"expert/{expert_id(block, expert)}/{metric}"] = flat[place]
                    place += 1
        for name in alone:
            values[name] = flat[place]
            place += 1
        return {name: None if value != value else value for name, value in values.items()}

    def _numbers(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """What `read` reports: by layer [L], by expert [L, E], and single numbers []. NaN: nothing to tell."""
        config, trace, c = self.config, self.last, self.coherence
        load = trace.chosen / trace.chosen.sum(-1, keepdim=True)
        per_layer = {
            "routing/load_cv": load.std(-1, correction=0) / load.mean(-1),
            "routing/dropped": 1 - trace.kept.sum(-1) / trace.chosen.sum(-1),
        }
        per_expert = {"load": load}
        alone = {}
        if config.router:
            state = self.router_state
            mean_prob = trace.prob / trace.tokens
            per_layer |= {
                f"routing/{name}": getattr(trace, name) / trace.tokens
                for name in ("js", "flip", "flip_set", "overlap", "relevance")
            }
            beta = state.beta_coeff
            per_layer |= {
                "routing/logit_std": state.logit_std,
                "routing/neff": torch.special.entr(mean_prob).sum(-1).exp(),
                "routing/saturation": mean_prob.amax(-1),
                "beta/mean": beta.mean(-1),
                "beta/std": beta.std(-1, correction=0),
                "beta/min": beta.amin(-1),
                "beta/max": beta.amax(-1),
                "beta/spread": beta.amax(-1) - beta.amin(-1),
                "beta/clamped": (beta.abs() >= config.k_max).to(beta.dtype).mean(-1),
            }
            per_expert["beta"] = beta
        if config.coherence:
            seen = c.ever_observed()
            any_seen = seen.any(-1)
            slow = c.phi("slow")
            per_layer |= {
                "coherence/layer": c.layer_phi().where(any_seen, torch.nan),
                "coherence/phi_slow_min": slow.masked_fill(~seen, torch.inf).amin(-1).where(any_seen, torch.nan),
                "coherence/phi_slow_max": slow.masked_fill(~seen, -torch.inf).amax(-1).where(any_seen, torch.nan),
                "coherence/starving": c.starving(),
            }
            per_expert |= {f"phi_{clock}": c.phi(clock).where(seen, torch.nan) for clock in CLOCKS}
        if config.lifecycle:
            alone["lifecycle/candidates"] = self.lifecycle.candidates()
        return per_layer, per_expert, alone


def expert_id(block: int, expert: int) -> str:
    """The name of an expert: "L0_E3" is expert 3 of the MoE layer in transformer block 0."""
    return f"L{block}_E{expert}"
