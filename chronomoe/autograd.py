"""What autograd Functions share whose backward is written out."""

from __future__ import annotations

import torch


def refuse_second_derivatives() -> None:
    """Raise RuntimeError if called in a backward that runs with create_graph=True.

    For a backward that takes saved intermediate values as constants: its own derivative would be wrong. torch's
    once_differentiable does not do: its error node is not connected to the inputs, so torch.autograd.grad passes it by.
    """
    # torch.compile traces backward with gradients enabled, and refuses second derivatives itself
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this function is differentiable once: create_graph=True is not supported")
