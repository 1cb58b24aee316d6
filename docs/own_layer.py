"""The loop around a mixture-of-experts layer that is not this project's. Needs `pip install -e .` and torch alone.

    python docs/own_layer.py

Trains the layer to imitate a random linear map, and prints what the loop measured.
"""

import torch
from torch import nn

from chronomoe import ChronoConfig, ChronoLoop, ChronoRouter, RouterState, collect_trace


class Layer(nn.Module):
    """Linear experts, each applied to all tokens, behind a ChronoRouter."""

    def __init__(self, width: int, num_experts: int, config: ChronoConfig):
        super().__init__()
        self.router = ChronoRouter(width, num_experts, top_k=2, config=config)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(num_experts)])
        self.router_state = RouterState(1, num_experts, config)  # of one MoE layer

    def forward(self, x):
        """Output [N, D] of hidden states x [N, D], and the trace that the loop reads."""
        (bias,) = self.router_state.layer_biases()
        routing = self.router(x, bias)
        gates = torch.zeros_like(routing.z_clean).scatter(-1, routing.experts, routing.gates).unsqueeze(-1)  # [N, E, 1]
        y = torch.stack([expert(x) for expert in self.experts], dim=1)  # [N, E, D]
        sums = torch.stack([(y * (gates > 0)).sum(0), (y * gates).sum(0)]).detach()  # [2, E, D]
        return (gates * y).sum(1), collect_trace([routing], self.router.config, outputs=[sums])


def train(layer: Layer, steps: int) -> ChronoLoop:
    """Train the layer with the loop closed. Returns the loop."""
    loop = ChronoLoop(layer.router_state, layer_ids=[0])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    width = layer.router.w_g.in_features
    target = nn.Linear(width, width).requires_grad_(False)
    for _ in range(steps):
        x = torch.randn(64, width)
        y, trace = layer(x)
        (y - target(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.step(trace)  # beta changes; the next forward reads it
    return loop


if __name__ == "__main__":
    torch.manual_seed(0)
    steps_on = dict.fromkeys(("router", "coherence", "beta", "bridge", "lifecycle"), True)
    loop = train(Layer(32, 8, ChronoConfig(**steps_on, eta=0.02, k_max=1.0)), steps=150)
    for name, value in loop.read().items():
        print(f"{name:30} {value}")
    for decision in loop.report():
        print(decision)
