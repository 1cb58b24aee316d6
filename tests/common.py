"""Small models and steps that several test files use."""

from __future__ import annotations

import torch

from chronomoe import ChronoConfig, ChronoLoop
from model import GPT, GPTConfig
from trainer.guard import NonFiniteGuard

ALL_STEPS = dict(router=True, coherence=True, beta=True, bridge=True, lifecycle=True)
SHAPE = dict(block_size=16, vocab_size=64, n_layer=4, n_head=2, n_embd=32, bias=False, n_exp=8, top_k=2, stride=2)


def chrono(**changes) -> ChronoConfig:
    """All five steps on, with `changes`."""
    return ChronoConfig(**(ALL_STEPS | changes))


def build(config: ChronoConfig | None = None, seed: int = 0, **changes) -> tuple[GPT, ChronoLoop]:
    """A small model with two MoE layers of eight experts, and its loop."""
    args = SHAPE | dict(use_aux_loss=True, use_router_z_loss=True, chrono=config or ChronoConfig()) | changes
    model = GPT(GPTConfig(**args), torch.Generator().manual_seed(seed))
    return model, ChronoLoop(model.router_state, model.config.moe_blocks)


def tokens(seed: int, batch: int = 8, model: GPT | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets [batch, block_size]."""
    config = model.config if model else GPTConfig(**SHAPE)
    shape = (batch, config.block_size + 1)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_step(model, loop, optimizer, batches, forward=None, guard=None) -> torch.Tensor:
    """One optimizer step over micro-batches [(idx, targets), ...] and the loop's; returns the mean loss, []."""
    forward = model if forward is None else forward
    guard = NonFiniteGuard(model) if guard is None else guard
    total, losses = None, 0
    for idx, targets in batches:
        _, loss, trace = forward(idx, targets, return_trace=True)
        (loss / len(batches)).backward()
        losses = losses + loss.detach() / len(batches)
        total = trace if total is None else total + trace
    total = total.summed_over_ranks()
    norms = guard.norms()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.linalg.vector_norm(norms))
    optimizer.found_inf = found_inf = guard.check(total, norms, 1)
    optimizer.step()
    optimizer.zero_grad()
    loop.step(total, found_inf)
    return losses


def adamw(model, learning_rate: float = 1e-3):
    return model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), "cpu")


def draw_beta(model, seed: int = 0, size: float = 1.0) -> None:
    """Random beta, and a logit_std of 1, so that routing differs visibly from clean routing."""
    beta = model.router_state.beta_coeff
    beta.copy_(size * torch.randn(beta.shape, generator=torch.Generator().manual_seed(seed)))


def loop_state(loop) -> dict[str, torch.Tensor]:
    """All state of the loop by name."""
    parts = {"router": loop.router_state.state_dict(), **loop.state_dict()}
    return {f"{part}.{name}": value.clone() for part, state in parts.items() for name, value in state.items()}
