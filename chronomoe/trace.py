"""What a forward passes to the loop: sums over tokens, which add over micro-batches and ranks.

Shapes: L MoE layers, E experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# Fields that are only logged. They do not affect state, and forward leaves them out with logged=False.
LOGGED = frozenset({"prob", "js", "overlap", "flip", "flip_set", "relevance"})


@dataclass
class MoETrace:
    """Sums over the tokens of one or more micro-batches. No field carries a gradient.

    A field is None where the step of the loop that uses it is off. `a + b` is the trace of both.
    """

    tokens: Tensor  # [] number of tokens
    batches: Tensor  # [] number of micro-batches
    cross_entropy: Tensor  # [] sum over micro-batches of their mean, nats per token
    aux_loss: Tensor  # [] the same, summed over layers, unweighted
    router_z_loss: Tensor  # [] the same, summed over layers, unweighted
    tokens_per_expert: Tensor | None = None  # [L, E] tokens routed to each expert
    kept_per_expert: Tensor | None = None  # [L, E] those within its capacity

    # Step 1
    prob: Tensor | None = None  # [L, E] biased routing probability
    logit_var: Tensor | None = None  # [L] variance of h W_g^T over the experts of a token, divisor E - 1
    js: Tensor | None = None  # [L] JS divergence of clean and applied routing, nats
    overlap: Tensor | None = None  # [L] probability mass moved by the applied bias
    flip: Tensor | None = None  # [L] first expert changed
    flip_set: Tensor | None = None  # [L] share of the top-K set changed
    disagreement: Tensor | None = None  # [L] the bridge's signal at full strength
    relevance: Tensor | None = None  # [L] strength with which beta was applied

    # Step 2
    output: Tensor | None = None  # [L, E, D] expert outputs
    gated_output: Tensor | None = None  # [L, E, D] gate times expert output; summed over E, the mixture
    gated_norm: Tensor | None = None  # [L, E] |gate times expert output|, for signal 'reap'
    first_order: Tensor | None = None  # [L, E] |gate times dL/dgate|, for signal 'first_order'

    is_reduced: bool = False  # already summed over ranks

    def required(self, name: str) -> Tensor:
        """The field `name`. Raises ValueError if it is None."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the trace has no {name}: build it with collect_trace and the config of the RouterState")
        return value

    def check(self, num_layers: int, num_experts: int) -> None:
        """Raise ValueError unless the shape of each field begins with [L, E], [L] or []."""
        for name, value in self.present().items():
            expected = (num_layers, num_experts)[: value.dim()]
            if value.shape[:2] != expected:
                raise ValueError(
                    f"the trace's {name} has shape {list(value.shape)}; the loop has {num_layers} layers of "
                    f"{num_experts} experts"
                )

    def present(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def __add__(self, other: MoETrace) -> MoETrace:
        mine, theirs = self.present(), other.present()
        sums: dict[str, Any] = {name: value + theirs[name] for name, value in mine.items()}
        return MoETrace(**sums)

    def summed_over_ranks(self) -> MoETrace:
        """Sum over ranks. Returns self if already reduced, or without torch.distributed.

        Takes one all-reduce, and a second one for fields that are only logged.
        """
        if self.is_reduced or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        present = self.present()
        summed: dict[str, Any] = {}
        # Logged fields are reduced separately: the rounding of a sum depends on its offset in the reduced tensor.
        for names in (present.keys() - LOGGED, present.keys() & LOGGED):
            values = {name: value for name, value in present.items() if name in names}
            if values:
                flat = torch.cat([value.reshape(-1) for value in values.values()])
                torch.distributed.all_reduce(flat)
                pieces = flat.split([value.numel() for value in values.values()])
                summed |= {name: piece.view_as(values[name]) for name, piece in zip(values, pieces)}
        return MoETrace(**summed, is_reduced=True)
