"""A GPT in which every `stride`-th block has a mixture of experts, routed by ChronoRouter.

Settings, weight names, registration order and signatures are nanoMoE's, so its configs and checkpoints work. Forward
is pure: it reads the loop's state and returns sums (MoETrace). Only ChronoLoop writes state.

Shapes: B sequences, T positions, N = B * T tokens, D n_embd, E n_exp, K top_k.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronomoe.config import ChronoConfig
from chronomoe.fuse import fused
from chronomoe.options import check_options, option
from chronomoe.router import ChronoRouter, RouterBias, RouterState, Routing
from chronomoe.statistics import collect_trace
from chronomoe.trace import MoETrace
from ops.cross_entropy import IGNORED, linear_cross_entropy
from ops.dispatch import from_experts, kept_gates, plan_dispatch, row_weights, sum_per_expert, to_experts
from ops.experts import MLPExperts, matmul_dtype

MAX_CAPACITY = 1 << 62  # slots; a larger one does not fit into int64
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@dataclass
class DenseConfig:
    """Shape of a dense GPT, by nanoGPT's names."""

    block_size: int = option(1024, "tokens per sequence", least=1, role="model")
    vocab_size: int = option(50304, "number of token ids", least=1, role="model")
    n_layer: int = option(12, "transformer blocks", least=1, role="model")
    n_head: int = option(12, "attention heads", least=1, role="model")
    n_embd: int = option(768, "model width", least=1, role="model")
    dropout: float = option(0.0, "dropout probability", least=0, below=1)
    bias: bool = option(True, "biases in linear layers and layer norms", role="model")


@dataclass
class GPTConfig(DenseConfig):
    """Shape and losses of the model, by nanoMoE's names; `chrono` holds the settings of the loop.

    Raises ValueError for a wrong type or a value out of range.
    """

    n_exp: int = option(1, "experts per MoE layer; 1: a dense model", least=1, role="model")
    top_k: int = option(2, "experts per token", least=1)
    use_aux_loss: bool = option(False, "add Switch Transformer's load-balancing loss")
    use_router_z_loss: bool = option(False, "add ST-MoE's router z-loss")
    use_noisy_top_k: bool = option(False, "learnt noise on the routing logits in training", role="model")
    aux_loss_weight: float = option(0.01, "weight of the load-balancing loss", least=0, only_with="use_aux_loss")
    router_z_loss_weight: float = option(0.001, "weight of the router z-loss", least=0, only_with="use_router_z_loss")
    train_capacity: float | None = option(None, "capacity factor of experts in training; None: dropless", above=0)
    eval_capacity: float | None = option(None, "capacity factor of experts in evaluation; None: dropless", above=0)
    min_capacity: int = option(4, "smallest capacity of an expert, in tokens", least=0)
    stride: int = option(2, "every stride-th block is a MoE layer, from block 0", least=1, role="model")
    use_switch_tfm_init: bool = option(False, "Switch Transformer's initialization")
    switch_tfm_init_scale: float = option(1.0, "scale of that initialization", above=0, only_with="use_switch_tfm_init")
    router_use_full_prec: bool = option(False, "routing logits without autocast (on CUDA float32 matmuls use TF32)")
    norm_topk_prob: bool = option(
        True,
        "gates are the softmax over the top_k chosen experts; False: over all experts, which top_k=1 needs to train "
        "its router",
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
            raise ValueError("the steps of the loop need experts to route between: n_exp > 1")

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


class LayerTrace(NamedTuple):
    routing: Routing
    kept_per_expert: Tensor | None  # [E] tokens within capacity; None: all that were routed
    outputs: Tensor | None  # [2, E, D] sums of y_e and of g_e y_e; None where step 2 is off
    gated_norm: Tensor | None = None  # [E] sums of |g_e y_e|; None unless the signal needs it


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
        self.experts = MLPExperts(config.n_exp, config.n_embd, config.bias, config.dropout)

    def forward(self, x: Tensor, bias: RouterBias | None, return_trace: bool) -> tuple[Tensor, LayerTrace]:
        """Mixture output [B, T, D] of x [B, T, D], and the layer's trace. Output sums need return_trace."""
        # the loop over experts reads token counts on the host, which one graph cannot
        mix = self._fused_mix if self.experts.uses_grouped_mm(x) else self._mix
        return mix(x, bias, return_trace)

    def _mix(self, x: Tensor, bias: RouterBias | None, return_trace: bool) -> tuple[Tensor, LayerTrace]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens, bias)
        capacity = self.capacity(len(tokens))
        plan = plan_dispatch(routing.experts, self.config.n_exp, capacity)
        gates = kept_gates(routing.gates, plan)
        weights = row_weights(gates.detach(), plan) if return_trace and self.config.chrono.coherence else None
        rows = to_experts(tokens, plan, matmul_dtype(tokens))
        rows, outputs = self.experts(rows, plan, weights)
        gated_norm = None
        if weights is not None and self.config.chrono.measures("gated_norm"):
            gated_norm = sum_per_expert(weights[1] * rows.detach().to(weights.dtype).norm(dim=-1), plan)
        kept = None if capacity is None else routing.tokens_per_expert.clamp_max(capacity)
        return from_experts(rows, gates, plan).view_as(x), LayerTrace(routing, kept, outputs, gated_norm)

    _fused_mix = fused(_mix)

    def capacity(self, num_tokens: int) -> int | None:
        """Capacity per expert by nanoMoE's rule: an even number, at least min_capacity. None: dropless."""
        c = self.config
        factor = c.train_capacity if self.training else c.eval_capacity
        if factor is None:
            return None
        slots = math.floor(min(self.router.top_k * factor * num_tokens / c.n_exp, MAX_CAPACITY))
        return max(slots + slots % 2, c.min_capacity)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, use_moe: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MOELayer(config) if use_moe else MLP(config)

    def forward(self, x: Tensor, bias: RouterBias | None, return_trace: bool) -> tuple[Tensor, LayerTrace | None]:
        x = x + self.attn(self.ln_1(x))
        if isinstance(self.mlp, MLP):
            return x + self.mlp(self.ln_2(x)), None
        y, trace = self.mlp(self.ln_2(x), bias, return_trace)
        return x + y, trace


class Transformer(nn.Module):
    """Embeddings, blocks and final norm, by nanoGPT's names."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        moe_blocks = set(config.moe_blocks)
        self.h = nn.ModuleList(Block(config, use_moe=i in moe_blocks) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    """The language model. `generator` draws the initial weights; None: torch's global generator."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.router_state = RouterState(len(config.moe_blocks), config.n_exp, config.chrono)
        self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        """GPT-2's scheme, or Switch Transformer's (https://arxiv.org/abs/2101.03961, section 2.4).

        As in nanoMoE, residual projections use GPT-2's scaled deviation in both.
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
                # nn.Linear stores [out, in], the experts [E, in, out]
                fan_in = p.shape[-1] if name in linear else p.shape[-2]
                std = math.sqrt(config.switch_tfm_init_scale / fan_in) or sys.float_info.min  # trunc_normal_ divides
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std, generator=generator)
            else:
                nn.init.normal_(p, std=0.02, generator=generator)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_trace: bool = False,
        logged: bool = True,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None] | tuple[Tensor | None, Tensor | None, MoETrace]:
        """Logits and loss of token ids idx [B, T]; with return_trace, also the MoETrace.

        Logits are [B, T, vocab_size]; without targets [B, 1, vocab_size], of the last position. The loss is the
        cross-entropy in nats per token, in train mode plus the weighted auxiliary losses; None without targets.

        Args:
            idx: token ids, T at most block_size.
            targets: [B, T] token ids; -1 does not count.
            return_trace: also return the sums that the loop needs.
            logged: False leaves out the trace's fields that are only logged.
            return_logits: False returns None for the logits if there are targets, which saves their memory.

        Raises ValueError if T exceeds block_size.
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
            x, layer = block(x, bias, return_trace)
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
            # without layers the sums are constants, which Inductor folds; the loss would lose its gradient
            if layers and self.training and self.config.use_aux_loss:
                loss = loss + self.config.aux_loss_weight * aux_loss
            if layers and self.training and self.config.use_router_z_loss:
                loss = loss + self.config.router_z_loss_weight * router_z_loss
        if not return_trace:
            return logits, loss
        routings, kept, outputs, gated_norms = zip(*layers) if layers else ((), (), (), ())
        losses = (cross_entropy, aux_loss, router_z_loss)
        trace = collect_trace(
            routings,
            self.config.chrono,
            idx.numel(),
            *losses,
            kept_per_expert=[k for k in kept if k is not None],
            outputs=[o for o in outputs if o is not None],
            logged=logged,
            gated_norms=[norm for norm in gated_norms if norm is not None],
        )
        return logits, loss, trace

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without position embeddings. Token embeddings are the output weights."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def num_active_params(self) -> int:
        """Number of parameters in one token's forward: top_k of n_exp experts."""
        experts = sum(p.numel() for m in self.modules() if isinstance(m, MLPExperts) for p in m.parameters())
        idle = experts * (self.config.n_exp - self.config.top_k) // self.config.n_exp
        return self.get_num_params(non_embedding=False) - idle

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to block_size positions, in place. Raises ValueError if it would grow."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size} is more than the model's {self.config.block_size}")
        self.config.block_size = block_size
        positions = self.transformer.wpe
        positions.weight = nn.Parameter(positions.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> GPT:
        """A dense GPT with OpenAI's GPT-2 weights, by transformers.

        model_type: one of GPT2_MODELS, or a folder in which transformers saved a GPT-2. override_args: `dropout`.
        Raises ValueError for another model or argument.
        """
        override_args = override_args or {}
        if model_type not in GPT2_MODELS and not Path(model_type).is_dir():
            raise ValueError(f"no pretrained model {model_type!r}: there are {', '.join(GPT2_MODELS)}")
        if set(override_args) - {"dropout"}:
            raise ValueError(f"only dropout can be overridden, not {', '.join(sorted(override_args))}")
        from transformers import GPT2LMHeadModel

        hugging_face = GPT2LMHeadModel.from_pretrained(model_type)
        c = hugging_face.config
        shape: dict[str, Any] = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size)
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
        """Fused AdamW. Weight decay applies to tensors of two or more dimensions, except biases.

        The order of parameters is nanoMoE's, because optimizer state is matched by order. Fused even where it is not
        faster: only the fused step can be skipped on the device (`optimizer.found_inf`).
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
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue token ids idx [B, T], yielding each next token [B, 1]. Call eval() first.

        The model sees the last block_size tokens. Temperature 0 takes the most likely token. top_k: sample from the k
        most likely tokens; None: from all. Raises ValueError if a logit is not finite.
        """
        for _ in range(max_new_tokens):
            idx = idx[:, -self.config.block_size :]
            logits = self(idx)[0][:, -1, :]
            scaled = logits / temperature if temperature else logits
            if not scaled.isfinite().all():
                raise ValueError(f"the model's logits, divided by temperature={temperature:g}, are not finite")
            if temperature == 0:
                next_id = scaled.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = scaled.topk(min(top_k, scaled.shape[-1])).values[:, -1:]
                    scaled = scaled.masked_fill(scaled < least, -torch.inf)
                next_id = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, next_id], dim=1)
            yield next_id
