"""The plan's vertical-slice harness, through the public API: chronomoe works with a MoE that is not model.py's."""

import torch
from torch import nn

from chronomoe import ChronoLoop, ChronoRouter, RouterState, collect_trace
from tests.helpers.models import chrono


class SimpleMoELayer(nn.Module):
    """A router and linear experts, each applied to all tokens."""

    def __init__(self, config, d_model=32, num_experts=8):
        super().__init__()
        self.router = ChronoRouter(d_model, num_experts, 2, config)
        self.experts = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(num_experts)])
        self.router_state = RouterState(1, num_experts, config)

    def forward(self, x):
        routing = self.router(x, self.router_state.layer_biases()[0])
        gates = torch.zeros_like(routing.z_clean).scatter(-1, routing.experts, routing.gates).unsqueeze(-1)  # [N, E, 1]
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [N, E, D]
        sums = torch.stack([(outputs * (gates > 0)).sum(0), (outputs * gates).sum(0)]).detach()
        losses = torch.zeros(()), routing.aux_loss, routing.router_z_loss
        return (gates * outputs).sum(1), collect_trace([routing], self.router.config, len(x), *losses, outputs=[sums])


def test_the_loop_closes_on_another_moe():
    config = chrono(eta=0.02, k_max=1.0, bridge_threshold=2e-4)
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
        before = layer.router_state.beta_coeff.clone()
        loop.step(trace)

    values, states = loop.read(), loop.snapshot()
    beta, phi = layer.router_state.beta_coeff, loop.coherence.phi("slow")
    free = beta.abs() < config.k_max
    torch.testing.assert_close((beta - before)[free], config.eta * (phi - config.tau)[free])
    assert free.any() and layer.router_state.disagreement > 2e-4 and values["routing/L0/relevance"] < 1
    assert all(state.total_tokens_seen > 0 and -1 <= state.phi_slow <= 1 for state in states.values())
    low = {f"L0_E{e}" for (_, e), state in states.items() if state.phi_slow < config.prune_phi}
    assert {d.expert_id for d in loop.report()} == low  # over 1000 tokens and 100 updates each
