"""What a forward hands to the loop: sums over tokens, so that micro-batches and ranks simply add.

Shapes: L MoE layers, E experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

LOGGED = frozenset({"prob", "js", "overlap", "flip", "flip_set", "relevance"})  # fields that only logs read


@dataclass
class MoETrace:
    """Sums over the tokens of one or more micro-batches; no field carries a gradient.

    A field is None where the step that it serves is off. `a + b` is the trace of both.
    """

    tokens: Tensor  # [] tokens seen
    batches: Tensor  # [] micro-batches seen
    cross_entropy: Tensor  # [] sum over micro-batches of their mean, nats per token
    aux_loss: Tensor  # [] likewise, summed over layers, unweighted
    router_z_loss: Tensor  # [] likewise
    chosen: Tensor | None = None  # [L, E] slots that chose the expert
    kept: Tensor | None = None  # [L, E] of those, slots within its capacity

    # Step 1
    prob: Tensor | None = None  # [L, E] biased routing probability
    logit_var: Tensor | None = None  # [L] variance of h W_g^T over the experts of a token, divisor E - 1
    js: Tensor | None = None  # [L] JS divergence of clean and used routing, nats
    overlap: Tensor | None = None  # [L] probability mass moved by the used bias
    flip: Tensor | None = None  # [L] first expert changed
    flip_set: Tensor | None = None  # [L] share of the top-K set changed
    disagreement: Tensor | None = None  # [L] the bridge's signal at full strength
    relevance: Tensor | None = None  # [L] strength with which beta was applied

    # Step 2
    output: Tensor | None = None  # [L, E, D] expert outputs
    gated_output: Tensor | None = None  # [L, E, D] gate times expert output; summed over E, the mixture

    of_all_ranks: bool = False  # summed over ranks already

    def present(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def __add__(self, other: MoETrace) -> MoETrace:
        mine, theirs = self.present(), other.present()
        return MoETrace(**{name: value + theirs[name] for name, value in mine.items()})

    def summed_over_ranks(self) -> MoETrace:
        """The trace of all ranks' tokens; itself where it is that already, or where there is one process.

        By one all-reduce, and another one for what only logs read.
        """
        if self.of_all_ranks or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        present = self.present()
        summed = {}
        # What only logs read goes by itself: a sum's bits depend on its place in the tensor that is reduced.
        for names in (present.keys() - LOGGED, present.keys() & LOGGED):
            values = {name: value for name, value in present.items() if name in names}
            if values:
                flat = torch.cat([value.reshape(-1) for value in values.values()])
                torch.distributed.all_reduce(flat)
                pieces = flat.split([value.numel() for value in values.values()])
                summed |= {name: piece.view_as(values[name]) for name, piece in zip(values, pieces)}
        return MoETrace(**summed, of_all_ranks=True)
