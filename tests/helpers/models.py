"""Small models, traces and training steps that several test files use."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chronomoe import ChronoConfig, ChronoLoop, MoETrace
from model import GPT, GPTConfig, MOELayer
from trainer.guard import NonFiniteGuard
from trainer.step import TrainingStep

ALL_STEPS = dict(router=True, coherence=True, beta=True, bridge=True, lifecycle=True)
SHAPE = dict(block_size=16, vocab_size=64, n_layer=4, n_head=2, n_embd=32, bias=False, n_exp=8, top_k=2, stride=2)


def chrono(**changes) -> ChronoConfig:
    """All five steps on, with `changes`."""
    return ChronoConfig(**(ALL_STEPS | changes))


def build(config: ChronoConfig | None = None, seed=0, beta=0.0, device=None, **changes) -> tuple[GPT, ChronoLoop]:
    """A small model with two MoE layers of eight experts, and its loop. beta: standard deviation of a random beta."""
    args = SHAPE | dict(use_aux_loss=True, use_router_z_loss=True, chrono=config or ChronoConfig()) | changes
    model = GPT(GPTConfig(**args), torch.Generator().manual_seed(seed))
    beta_coeff = model.router_state.beta_coeff
    beta_coeff.copy_(beta * torch.randn(beta_coeff.shape, generator=torch.Generator().manual_seed(0)))
    model = model if device is None else model.to(device)
    return model, ChronoLoop(model.router_state, model.config.moe_blocks)


def moe_layer(dtype: torch.dtype = torch.float64, **changes) -> MOELayer:
    """One MoE layer of five experts with random weights and biases."""
    layer = MOELayer(GPTConfig(**dict(n_embd=16, n_head=1, n_exp=5, top_k=2, bias=True, min_capacity=1) | changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3, generator=generator)
    return layer.to(dtype)


def tokens(seed: int, batch: int = 8, model: GPT | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets [batch, block_size]."""
    sizes = SHAPE if model is None else vars(model.config)
    shape = (batch, sizes["block_size"] + 1)
    ids = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def trace_of(phi, kept, **fields) -> MoETrace:
    """A trace in which the experts have coherence phi [L, E] with the mixture, and kept [L, E] tokens."""
    phi, kept = torch.as_tensor(phi, dtype=torch.float32), torch.as_tensor(kept, dtype=torch.float32)
    output = torch.cat([phi.unsqueeze(-1), torch.diag_embed((1 - phi.square()).sqrt())], dim=-1)
    gated_output = torch.zeros_like(output)
    gated_output[:, 0, 0] = 1  # the mixture is the first axis
    one, per_layer = torch.ones(()), torch.zeros(len(phi))
    values = dict(tokens=one, batches=one, cross_entropy=one, aux_loss=one, router_z_loss=one)
    values |= dict(tokens_per_expert=kept, kept_per_expert=kept, output=output, gated_output=gated_output)
    values |= dict(prob=torch.full_like(phi, 1 / phi.shape[1]), logit_var=per_layer + 1, disagreement=per_layer)
    values |= dict.fromkeys(("js", "overlap", "flip", "flip_set", "relevance"), per_layer)
    return MoETrace(**values | fields)


def record_routers(model) -> list:
    """A list to which each forward appends (hidden states [N, D], Routing) of each MoE layer."""
    found: list = []
    for block in model.config.moe_blocks:
        router = model.transformer.h[block].mlp.router
        router.register_forward_hook(lambda _, args, routing: found.append((args[0].detach(), routing)))
    return found


def training_step(model, loop, optimizer, scaler=None, **options) -> TrainingStep:
    """A TrainingStep of a small model. The default scaler is off: it leaves losses and gradients as they are."""
    scaler = scaler or torch.amp.GradScaler(next(model.parameters()).device.type, enabled=False)
    return TrainingStep(model, optimizer, loop, NonFiniteGuard(model), scaler, **options)


def train_step(model, loop, optimizer, batches, forward=None, logged=True) -> torch.Tensor:
    """One TrainingStep over micro-batches [(idx, targets), ...]; returns the mean cross-entropy, []."""
    step = training_step(model, loop, optimizer, forward=forward, micro_batches=len(batches))
    trace = step(batches, step=1, logged=logged).trace
    return trace.cross_entropy / trace.batches


def adamw(model, learning_rate: float = 1e-3) -> torch.optim.AdamW:
    return model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), "cpu")


def loop_state(loop) -> dict[str, torch.Tensor]:
    """All state of the loop by name."""
    parts = {"router": loop.router_state.state_dict(), **loop.state_dict()}
    return {f"{part}.{name}": value.clone() for part, state in parts.items() for name, value in state.items()}


def state_of(model, loop) -> dict[str, torch.Tensor]:
    """Copies of all weights and of the loop's state by name."""
    return {name: value.clone() for name, value in model.state_dict().items()} | loop_state(loop)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless both hold the same names and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Operators(TorchDispatchMode):
    """Counts the operators that run, and the entries of the largest tensor that one returns, views left out."""

    count = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return out
