"""A GPT whose every `stride`-th block is a mixture of experts, routed by ChronoRouter.

Settings, weight names, registration order and signatures are nanoMoE's, so its configs and checkpoints work here.
Forward is pure: it reads the loop's state and returns sums (MoETrace); only ChronoLoop writes state.

Shapes: B sequences, T positions, N = B * T tokens, D n_embd, E n_exp, K top_k, S = K * N slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe.autograd import refuse_second_derivatives
from chronomoe.config import ChronoConfig
from chronomoe.dispatch import (
    Dispatch,
    from_experts,
    kept_gates,
    plan_dispatch,
    row_weights,
    run_lengths,
    to_experts,
)
from chronomoe.options import check_options, option
from chronomoe.router import ChronoRouter, RouterBias, RouterState, Routing
from chronomoe.statistics import collect_trace
from chronomoe.trace import MoETrace
from cross_entropy import IGNORED, linear_cross_entropy


@dataclass
class GPTConfig:
    """The model's shape and losses, by nanoMoE's names; `chrono` holds the loop's settings.

    A capacity of None is dropless; a number is nanoMoE's capacity factor. Raises ValueError for a value of a wrong type
    or out of range.
    """

    block_size: int = option(1024, "tokens a sequence", least=1, role="model")
    vocab_size: int = option(50304, "token ids", least=1, role="model")
    n_layer: int = option(12, "transformer blocks", least=1, role="model")
    n_head: int = option(12, "attention heads", least=1, role="model")
    n_embd: int = option(768, "width", least=1, role="model")
    dropout: float = option(0.0, "dropout probability", least=0, below=1)
    bias: bool = option(True, "biases in linear layers and layer norms", role="model")

    n_exp: int = option(1, "experts in a MoE layer; 1 is a dense model", least=1, role="model")
    top_k: int = option(2, "experts a token", least=1)
    use_aux_loss: bool = option(False, "add Switch Transformer's load-balancing loss")
    use_router_z_loss: bool = option(False, "add ST-MoE's router z-loss")
    use_noisy_top_k: bool = option(False, "learnt noise on the routing logits while training", role="model")
    aux_loss_weight: float = option(0.01, "weight of the load-balancing loss", least=0, needs="use_aux_loss")
    router_z_loss_weight: float = option(0.001, "weight of the router z-loss", least=0, needs="use_router_z_loss")
    train_capacity: float | None = option(None, "capacity factor of an expert while training; None: dropless", above=0)
    eval_capacity: float | None = option(None, "capacity factor of an expert in evaluation; None: dropless", above=0)
    min_capacity: int = option(4, "smallest capacity of an expert, in tokens", least=0)
    stride: int = option(2, "every stride-th block is a MoE layer, from block 0", least=1, role="model")
    use_switch_tfm_init: bool = option(False, "Switch Transformer's initial weights")
    switch_tfm_init_scale: float = option(1.0, "their scale", above=0, needs="use_switch_tfm_init")
    router_use_full_prec: bool = option(False, "routing logits without autocast (on CUDA float32 matmuls use TF32)")
    norm_topk_prob: bool = option(
        True,
        "gates are the softmax over the top_k chosen experts; False: over all experts, without which top_k=1 trains no "
        "router",
    )

    chrono: ChronoConfig = field(default_factory=ChronoConfig)

    def __post_init__(self) -> None:
        check_options(self)
        if not isinstance(self.chrono, ChronoConfig):
            raise ValueError(f"chrono={self.chrono!r} must be a ChronoConfig")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_exp > 1 and not 1 <= self.top_k <= self.n_exp:
            raise ValueError(f"top_k={self.top_k} must be between 1 and n_exp={self.n_exp}")
        if self.chrono.steps_on() and self.n_exp == 1:
            raise ValueError("the steps of the loop route between experts: they need n_exp > 1")

    @property
    def moe_blocks(self) -> list[int]:
        """Indices of the transformer blocks with experts: 0, stride, 2 * stride, ..."""
        return list(range(0, self.n_layer, self.stride)) if self.n_exp > 1 else []


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class MLPExperts(nn.Module):
    """E MLPs, each applied to its own run of rows."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        E, D = config.n_exp, config.n_embd
        self.c_fc = nn.Parameter(torch.empty(E, D, 4 * D))
        self.c_proj = nn.Parameter(torch.empty(E, 4 * D, D))
        self.fc_bias = nn.Parameter(torch.empty(E, 1, 4 * D)) if config.bias else None
        self.proj_bias = nn.Parameter(torch.empty(E, 1, D)) if config.bias else None
        self.dropout = nn.Dropout(config.dropout)
        # None: grouped_mm for bfloat16 on CUDA, else a loop over slices. True and False force one of the two.
        self.use_grouped_mm: bool | None = None

    def forward(self, rows: Tensor, plan: Dispatch, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Expert outputs [S, D] of rows [S, D] sorted by `plan`; with `weights` [2, S] also sums by them [2, E, D]."""
        if self._grouped(rows):
            return self._forward_grouped(rows, plan, weights)
        return self._forward_loop(rows, plan, weights)

    def _grouped(self, rows: Tensor) -> bool:
        if self.use_grouped_mm is not None:
            return self.use_grouped_mm
        # grouped_mm wants rows of a multiple of 16 bytes
        return rows.device.type == "cuda" and _dtype_of_products(rows) == torch.bfloat16 and rows.shape[-1] % 8 == 0

    def _forward_loop(self, rows, plan, weights):
        sizes = run_lengths(plan).tolist()
        tensors = [rows, self.c_fc, self.c_proj, self.fc_bias, self.proj_bias]
        tensors = [None if x is None else x.to(_dtype_of_products(rows)) for x in tensors]
        y = self.dropout(_ExpertLoop.apply(*tensors, sizes, torch.is_grad_enabled()))
        if weights is None:
            return y, None
        with torch.autocast(y.device.type, enabled=False):
            sums = [_weighted_sum(*each) for each in zip(weights.split(sizes, dim=-1), y.split(sizes))]
        return y, torch.stack(sums, dim=1)

    def _forward_grouped(self, rows, plan, weights):
        # grouped_mm does not take part in autocast: anything but bfloat16 falls back to a path that syncs
        one_hot = None
        if self.fc_bias is not None or weights is not None:
            one_hot = plan.experts.unsqueeze(-1) == torch.arange(len(self.c_fc), device=rows.device)
        h = _grouped_linear(rows, self.c_fc, self.fc_bias, plan, one_hot)
        y = _grouped_linear(F.gelu(h), self.c_proj, self.proj_bias, plan, one_hot)
        y = self.dropout(y)
        return y, None if weights is None else _sums_by_selector(weights, y, one_hot)


class _ExpertLoop(torch.autograd.Function):
    """gelu(x W_fc + b_fc) W_proj + b_proj for each expert's rows, one expert after the other.

    Written out so that each expert's gradient goes to its place in that of all: autograd would gather them in a second
    tensor of the size of all experts. An expert's hidden rows are still in the cache when they are used.
    """

    @staticmethod
    def forward(ctx, rows, c_fc, c_proj, fc_bias, proj_bias, sizes, keep):
        out, hidden, active = [], [], []
        for e, x in enumerate(rows.split(sizes)):
            h = _linear(x, c_fc[e], fc_bias, e)
            a = F.gelu(h)
            out.append(_linear(a, c_proj[e], proj_bias, e))
            if keep:  # for backward
                hidden.append(h)
                active.append(a)
        ctx.save_for_backward(rows, c_fc, c_proj, *hidden, *active)
        ctx.sizes, ctx.biased = sizes, fc_bias is not None
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        rows, c_fc, c_proj, *saved = ctx.saved_tensors
        hidden, active = saved[: len(c_fc)], saved[len(c_fc) :]
        grad_rows, grad_fc, grad_proj = [], torch.empty_like(c_fc), torch.empty_like(c_proj)
        grad_biases = [grad.new_empty(len(c_fc), 1, c.shape[-1]) if ctx.biased else None for c in (c_fc, c_proj)]
        for e, (x, g) in enumerate(zip(rows.split(ctx.sizes), grad.split(ctx.sizes))):
            torch.mm(active[e].t(), g, out=grad_proj[e])
            grad_h = torch.ops.aten.gelu_backward(g @ c_proj[e].t(), hidden[e])
            torch.mm(x.t(), grad_h, out=grad_fc[e])
            grad_rows.append(grad_h @ c_fc[e].t())
            if ctx.biased:
                torch.sum(grad_h, 0, keepdim=True, out=grad_biases[0][e])
                torch.sum(g, 0, keepdim=True, out=grad_biases[1][e])
        return torch.cat(grad_rows), grad_fc, grad_proj, *grad_biases, None, None


def _linear(x: Tensor, weight: Tensor, biases: Tensor | None, e: int) -> Tensor:
    return x @ weight if biases is None else torch.addmm(biases[e], x, weight)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: autocast's precision where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Dispatch, one_hot: Tensor | None) -> Tensor:
    """x [S, in] times each row's own expert's weight [E, in, out], in bfloat16."""
    out = F.grouped_mm(x.bfloat16(), weight.bfloat16(), offs=plan.ends)
    # a matmul with the selector, because the backward of bias[experts] would add with atomics
    return out if bias is None else out + one_hot.bfloat16() @ bias.squeeze(1).bfloat16()


def _weighted_sum(weights: Tensor, y: Tensor) -> Tensor:
    """weights [W, n] @ y [n, D] in the weights' precision: phi taken from bfloat16 sums is off by 2e-3."""
    return torch.mm(weights, y.detach().to(weights.dtype))


@torch.no_grad()
def _sums_by_selector(weights: Tensor, y: Tensor, one_hot: Tensor) -> Tensor:
    """Sums [2, E, D] of outputs y [S, D] by weights [2, S], the rows of each expert marked in one_hot [S, E].

    In the weights' precision, as `_weighted_sum`.
    """
    with torch.autocast(weights.device.type, enabled=False):
        per_expert = one_hot.t() * weights.unsqueeze(1)  # [2, E, S]
        return (per_expert.flatten(0, 1) @ y.to(weights.dtype)).view(2, one_hot.shape[1], -1)


class LayerTrace(NamedTuple):
    routing: Routing
    kept: Tensor | None  # [E] slots within the experts' capacity; None: all that were chosen
    outputs: Tensor | None  # [2, E, D] sums of y_e and of g_e y_e; None where step 2 is off


class MOELayer(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.router = ChronoRouter(
            config.n_embd,
            config.n_exp,
            config.top_k,
            config.chrono,
            norm_topk_prob=config.norm_topk_prob,
            noisy=config.use_noisy_top_k,
            full_precision=config.router_use_full_prec,
        )
        self.experts = MLPExperts(config)

    def forward(self, x: Tensor, bias: RouterBias | None, with_stats: bool) -> tuple[Tensor, LayerTrace]:
        """Mixture output for x [B, T, D], and what the layer has to tell."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens, bias)
        capacity = self.capacity(len(tokens))
        plan = plan_dispatch(routing.experts, self.config.n_exp, capacity)
        gates = kept_gates(routing.gates, plan)
        weights = row_weights(gates.detach(), plan) if with_stats and self.config.chrono.coherence else None
        rows, outputs = self.experts(to_experts(tokens, plan), plan, weights)
        kept = None if capacity is None else routing.chosen.clamp_max(capacity)
        return from_experts(rows, gates, plan).view_as(x), LayerTrace(routing, kept, outputs)

    def capacity(self, num_tokens: int) -> int | None:
        """Slots an expert takes, by nanoMoE's rule: an even number, at least min_capacity. None: dropless."""
        c = self.config
        factor = c.train_capacity if self.training else c.eval_capacity
        if factor is None:
            return None
        slots = math.floor(self.router.top_k * factor * num_tokens / c.n_exp)
        return max(slots + slots % 2, c.min_capacity)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, use_moe: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MOELayer(config) if use_moe else MLP(config)

    def forward(self, x: Tensor, bias: RouterBias | None, with_stats: bool) -> tuple[Tensor, LayerTrace | None]:
        x = x + self.attn(self.ln_1(x))
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.ln_2(x)), None
        y, trace = self.mlp(self.ln_2(x), bias, with_stats)
        return x + y, trace


class GPT(nn.Module):
    """The language model. `generator` seeds the initial weights; None takes torch's global one."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        moe_blocks = config.moe_blocks
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, use_moe=i in moe_blocks) for i in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.router_state = RouterState(len(moe_blocks), config.n_exp, config.chrono)
        self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """GPT-2's scheme, or Switch Transformer's (https://arxiv.org/abs/2101.03961, section 2.4).

        As in nanoMoE, residual projections get GPT-2's scaled deviation in either.
        """
        config = self.config
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        linear = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for name, p in self.named_parameters():
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                nn.init.ones_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("c_proj.weight", "experts.c_proj")):
                nn.init.normal_(p, std=residual_std, generator=generator)
            elif config.use_switch_tfm_init and (name in linear or name.endswith("experts.c_fc")):
                # nn.Linear holds [out, in], the experts [E, in, out]
                fan_in = p.shape[-1] if name in linear else p.shape[-2]
                std = math.sqrt(config.switch_tfm_init_scale / fan_in)
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std, generator=generator)
            else:
                nn.init.normal_(p, std=0.02, generator=generator)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_trace: bool | Literal["state"] = False,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None] | tuple[Tensor | None, Tensor | None, MoETrace]:
        """Logits and loss of token ids idx [B, T], T at most block_size; with return_trace, also the MoETrace.

        targets [B, T]: ids, -1 is left out. Logits are [B, T, vocab_size], or [B, 1, vocab_size] of the last position
        without targets; with return_logits=False they are None if there are targets, and need no memory where the
        vocabulary is large. return_trace="state" leaves out of the trace what only logs read. The loss is cross-entropy
        in nats per token; in train mode plus the weighted auxiliary losses. Raises ValueError if T exceeds block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens does not fit block_size={self.config.block_size}")
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe(torch.arange(T, device=idx.device)))
        biases = iter(self.router_state.layer_biases())
        layers: list[LayerTrace] = []
        for block in t.h:
            bias = next(biases) if isinstance(block.mlp, MOELayer) else None
            x, layer = block(x, bias, bool(return_trace))
            if layer is not None:
                layers.append(layer)
        x = t.ln_f(x)

        zero = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        aux_loss = sum((layer.routing.aux_loss for layer in layers), zero)
        router_z_loss = sum((layer.routing.router_z_loss for layer in layers), zero)
        if targets is None:
            logits, cross_entropy, loss = self.lm_head(x[:, -1:]), zero, None
        else:
            x, targets = x.flatten(0, 1), targets.flatten()
            if return_logits:
                logits = self.lm_head(x)
                cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED)
                logits = logits.view(*idx.shape, -1)
            else:
                logits, cross_entropy = None, linear_cross_entropy(x, self.lm_head.weight, targets)
            loss = cross_entropy
            if self.training and self.config.use_aux_loss:
                loss = loss + self.config.aux_loss_weight * aux_loss
            if self.training and self.config.use_router_z_loss:
                loss = loss + self.config.router_z_loss_weight * router_z_loss
        if not return_trace:
            return logits, loss
        routings, kept, outputs = zip(*layers) if layers else ((), (), ())
        losses = cross_entropy, aux_loss, router_z_loss
        trace = collect_trace(
            routings,
            self.config.chrono,
            idx.numel(),
            *losses,
            kept=[k for k in kept if k is not None],
            outputs=[o for o in outputs if o is not None],
            logged=return_trace != "state",
        )
        return logits, loss, trace

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without position embeddings; token embeddings are the output layer."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def num_active_params(self) -> int:
        """Parameters that take part in one token's forward: of the experts, top_k of n_exp."""
        experts = sum(p.numel() for m in self.modules() if isinstance(m, MLPExperts) for p in m.parameters())
        idle = experts * (self.config.n_exp - self.config.top_k) // self.config.n_exp
        return self.get_num_params(non_embedding=False) - idle

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to block_size positions, in place. Raises ValueError if it would grow."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size} is more than the model's {self.config.block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> GPT:
        """A dense GPT with OpenAI's GPT-2 weights, by transformers.

        model_type: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder that transformers saved a GPT-2 in.
        override_args may hold `dropout`. Raises ValueError for another model or argument.
        """
        override_args = override_args or {}
        names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
        if model_type not in names and not Path(model_type).is_dir():
            raise ValueError(f"no pretrained model {model_type!r}: there are {', '.join(names)}")
        if set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(override_args))}")
        from transformers import GPT2LMHeadModel

        hugging_face = GPT2LMHeadModel.from_pretrained(model_type)
        c = hugging_face.config
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size)
        model = cls(GPTConfig(block_size=c.n_positions, bias=True, **shape, **override_args))
        theirs = hugging_face.state_dict()
        ours = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, p in ours.items():
                weight = theirs[name]
                # GPT-2 stores its linear layers as [in, out]
                transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                p.copy_(weight.t() if transposed else weight)
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Fused AdamW; tensors of two or more dimensions that are no biases decay.

        An optimizer's state is matched by parameter order, which is nanoMoE's. Fused also where it is no faster,
        because only the fused step can be skipped on the device (`optimizer.found_inf`).
        """
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decays = {name: p.dim() >= 2 and not name.endswith("bias") for name, p in params.items()}
        groups = [
            {"params": [p for name, p in params.items() if decays[name]], "weight_decay": weight_decay},
            {"params": [p for name, p in params.items() if not decays[name]], "weight_decay": 0.0},
        ]
        fused = device_type in ("cpu", "cuda", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue token ids idx [B, T] by max_new_tokens: [B, T + max_new_tokens]. Call eval() first."""
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            next_id = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, next_id], dim=1)
        return idx
