"""The plan's vertical-slice harness, through the public API: chronomoe serves a MoE that is not model.py's."""

import torch
from torch import nn

from chronomoe import ChronoConfig, ChronoLoop, ChronoRouter, RouterState, collect_trace


class SimpleMoELayer(nn.Module):
    """One router and linear experts, each run on all tokens: simple, and enough for the loop."""

    def __init__(self, config: ChronoConfig, d_model=32, num_experts=8, top_k=2):
        super().__init__()
        self.router = ChronoRouter(d_model, num_experts, top_k, config)
        self.experts = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(num_experts)])
        self.router_state = RouterState(1, num_experts, config)

    def forward(self, x):
        routing = self.router(x, self.router_state.layer_biases()[0])
        gates = torch.zeros_like(routing.z_clean).scatter(-1, routing.experts, routing.gates)  # [N, E]
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [N, E, D]
        y = (gates.unsqueeze(-1) * outputs).sum(1)
        with torch.no_grad():
            chosen = (gates > 0).unsqueeze(-1)
            sums = torch.stack([(outputs * chosen).sum(0), (outputs * gates.unsqueeze(-1)).sum(0)])
        losses = torch.zeros(()), routing.aux_loss, routing.router_z_loss
        return y, collect_trace([routing], self.router_state.config, len(x), *losses, outputs=[sums])


def test_the_plans_loop_closes_on_another_moe():
    config = ChronoConfig(
        router=True, coherence=True, beta=True, bridge=True, lifecycle=True, eta=0.02, k_max=1.0, bridge_threshold=1e-3
    )
    layer = SimpleMoELayer(config)
    loop = ChronoLoop(layer.router_state, layer_ids=[0])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    target = nn.Linear(32, 32)
    for _ in range(150):
        x = torch.randn(64, 32)
        y, trace = layer(x)
        (y - target(x).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        phi_before = loop.coherence.phi("slow").clone()
        beta_before = layer.router_state.beta_coeff.clone()
        loop.step(trace)

    values, states = loop.read(), loop.snapshot()
    assert not torch.equal(phi_before, loop.coherence.phi("slow"))
    moved = layer.router_state.beta_coeff - beta_before
    free = layer.router_state.beta_coeff.abs() < config.k_max
    torch.testing.assert_close(moved[free], config.eta * (loop.coherence.phi("slow") - config.tau)[free])
    assert values["routing/L0/js"] > 0 and values["routing/L0/relevance"] < 1
    assert all(state.total_tokens_seen > 0 and -1 <= state.phi_slow <= 1 for state in states.values())
    low = {f"L0_E{e}" for (_, e), state in states.items() if state.phi_slow < config.prune_phi}
    proposed = {d.expert_id for d in loop.report()}
    assert proposed == low  # over 1000 tokens and 100 updates each
    assert len(layer.experts) == 8  # a dry run
