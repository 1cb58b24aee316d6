"""Small models and steps that several test files use."""

from __future__ import annotations

import torch

from chronomoe import ChronoConfig, ChronoLoop
from model import GPT, GPTConfig
from trainer.guard import NonFiniteGuard
from trainer.step import TrainingStep

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


def training_step(model, loop, optimizer, guard=None, **options) -> TrainingStep:
    """A TrainingStep of a small model. A scaler that is off leaves losses and gradients as they are."""
    guard = NonFiniteGuard(model) if guard is None else guard
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=False)
    return TrainingStep(model, optimizer, loop, guard, scaler, **options)


def train_step(model, loop, optimizer, batches, forward=None, guard=None, logged=True, **options) -> torch.Tensor:
    """One TrainingStep over micro-batches [(idx, targets), ...]; returns the mean cross-entropy, []."""
    step = training_step(model, loop, optimizer, guard, forward=forward, micro_batches=len(batches), **options)
    trace = step(batches, step=1, logged=logged).trace
    return trace.cross_entropy / trace.batches


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
