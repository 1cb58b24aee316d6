"""Compile chains of small operators into few kernels. On a GPU they take longer to launch than to run.

Functions marked `fused` run eagerly, and through torch.compile inside a `fusion` block. Inside a model that is compiled
as a whole they are traced with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
Backend = str | Callable[..., Any]
_backend: Backend | None = None
MAX_GRAPHS = 64  # of a function


def fused(function: Function) -> Function:
    """Mark a function for `fusion`. torch.compile must be able to trace it as one graph."""

    @functools.cache
    def compiled(backend: Backend) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=backend)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if _backend is None or torch.compiler.is_compiling():
            return function(*args)
        return compiled(_backend)(*args)

    return call  # type: ignore[return-value]


@contextmanager
def fusion(backend: Backend | None = "inductor") -> Iterator[None]:
    """Compile the functions marked `fused` when they are called in this block.

    Each shape is compiled by itself; after MAX_GRAPHS of them, a function runs eagerly. `backend` is passed to
    torch.compile; None: run the functions eagerly.
    """
    global _backend
    before, _backend = _backend, backend
    try:
        if backend is None:
            yield
        else:
            import torch._dynamo.config
            import torch._inductor.config

            # Inductor would choose between orders of summation by time, in each process for itself
            deterministic = torch._inductor.config.patch(deterministic=True)
            with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS), deterministic:
                yield
    finally:
        _backend = before
