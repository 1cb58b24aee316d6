"""Replay forward and backward of a micro-batch as a CUDA graph, which takes one launch. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chronomoe import MoETrace
from trainer.errors import UserError

WARM_UP = 3  # calls before the capture, in which libraries allocate and torch.compile compiles


class Captured(NamedTuple):
    x: Tensor
    y: Tensor
    trace: MoETrace  # each replay overwrites its tensors
    replay: Callable[[], None]


class GraphedBackward:
    """Calls `backward` of (inputs, targets, logged) through one CUDA graph per value of `logged`.

    `backward` adds to the gradients of `parameters`, which must be None or zero at the first call for each value of
    `logged`. A graph reads and writes fixed addresses: zero the gradients in place, and keep the shapes of the inputs.
    """

    def __init__(self, backward: Callable[[Tensor, Tensor, bool], MoETrace], parameters: Iterable[Tensor]):
        self.backward = backward
        self.parameters = list(parameters)
        self.captured: dict[bool, Captured] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, x: Tensor, y: Tensor, logged: bool) -> MoETrace:
        """The trace of a micro-batch. Raises UserError if an operation in `backward` synchronizes with the device."""
        if logged not in self.captured:
            self.captured[logged] = self._capture(x.clone(), y.clone(), logged)
        captured = self.captured[logged]
        captured.x.copy_(x)
        captured.y.copy_(y)
        captured.replay()
        values: dict[str, Any] = {name: value.clone() for name, value in captured.trace.present().items()}
        return MoETrace(**values)

    def _capture(self, x: Tensor, y: Tensor, logged: bool) -> Captured:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            trace, replay = capture(lambda: self.backward(x, y, logged), self.pool)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.zero_()  # what the warm-up added
        return Captured(x, y, trace, replay)


def capture(work: Callable[[], MoETrace], pool: Any) -> tuple[MoETrace, Callable[[], None]]:
    """Call `work` WARM_UP times, then record it. Returns its result, in tensors that each replay fills, and replay.

    pool: of the graphs' memory, which they share; so read the result before another graph is replayed.
    """
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads may allocate: one copies the next batch
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            return work(), graph.replay
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        raise UserError(
            "cuda_graphs=True: a step that synchronizes with the device cannot be captured; experts in bfloat16 on "
            f"compute capability 9.0 or 10.0 can: {str(e).splitlines()[0]}"
        ) from e
