"""Shared by the autograd Functions whose backward is written out."""

from __future__ import annotations

import torch


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward that runs with create_graph=True.

    Such a backward treats saved intermediate values as constants, so its own derivative would be wrong.
    torch.autograd.function.once_differentiable does not help: its error node is not connected to the inputs, and
    torch.autograd.grad skips it.
    """
    # torch.compile traces the backward with gradients enabled and rejects second derivatives itself
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this function is differentiable once: create_graph=True is not supported")
