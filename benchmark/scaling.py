"""Compare the formulas of docs/scaling.md with counts of FLOP, bytes and operators. Counts are the same in every run.

Numbers of operators and the bytes that they read and write depend on the version of torch; those in EXACT do not.

All five steps of the loop are on, and the training step does not log. Shapes: L MoE layers, E experts, D width,
K top_k, N tokens of a micro-batch, in float32 (4 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmark.layer import ALL_ON
from benchmark.timing import Effort, Report
from chronomoe import ChronoLoop, RouterBias, RouterState, collect_trace
from chronomoe.statistics import MAX_ENTRIES
from model import GPTConfig, MOELayer

VIEWS = ("view", "detach", "unsqueeze", "select", "slice", "transpose", "t.", "expand", "unbind", "permute", "split")


class Sizes(NamedTuple):
    L: int
    E: int
    D: int
    K: int
    N: int


SIZES = [
    Sizes(2, 8, 128, 2, 2048),  # the slice
    Sizes(2, 64, 128, 2, 2048),
    Sizes(8, 8, 128, 2, 512),
    Sizes(3, 8, 384, 2, 4096),  # nanoMoE's layers
    Sizes(4, 32, 64, 4, 1024),
    Sizes(1, 256, 256, 8, 2048),
    Sizes(12, 64, 64, 2, 16384),  # the statistics process its layers in three groups
]


def groups(s: Sizes) -> int:
    """Number of groups in which the statistics process the layers: as many layers at a time as fit in MAX_ENTRIES."""
    at_a_time = max(1, MAX_ENTRIES // (s.N * s.E))
    return -(-s.L // at_a_time)


# Counts that do not depend on the version of torch.
EXACT = (
    "layer: floating-point operations",
    "layer: the same without the experts', grouped",
    "loop: bytes of state",
    "trace: bytes in the all-reduce",
)
FORMULAS: dict[str, Callable[[Sizes], int]] = {
    "layer: floating-point operations": lambda s: 48 * s.K * s.N * s.D**2 + 6 * s.N * s.E * s.D + 4 * s.K * s.N * s.D,
    "layer: the same without the experts', grouped": lambda s: 6 * s.N * s.E * s.D + 4 * s.E * s.K * s.N * s.D,
    "layer: bytes kept for backward": lambda s: (
        40 * s.K * s.N * s.D + 36 * s.K * s.N + 4 * s.N * s.E + 4 * s.N + 4 * s.E
    ),
    "layer: operators, a loop over experts": lambda s: 66 + s.K + 9 * s.E,
    "layer: operators, experts grouped": lambda s: 84 + s.K,
    "statistics: operators": lambda s: 4 + 25 * groups(s) + 2 * (groups(s) > 1),
    "statistics: bytes read and written": lambda s: 4 * s.L * (46 * s.N * s.E + 6 * s.N + 4 * s.E * s.D),
    "loop: operators": lambda s: 88,
    "loop: bytes read and written": lambda s: 4 * s.L * (5 * s.E * s.D + 3 * s.D) + 574 * s.L * s.E + 169 * s.L + 127,
    "loop: bytes of state": lambda s: 60 * s.L * s.E + 12 * s.L + 16,
    "trace: bytes in the all-reduce": lambda s: 4 * (5 + s.L * (2 * s.E * s.D + 2 * s.E + 2)),
}


class Traffic(TorchDispatchMode):
    """Counts operators that are not views, and the bytes of their operands and results, as if none were fused."""

    def __init__(self):
        super().__init__()
        self.operators = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not str(func).removeprefix("aten.").startswith(VIEWS):
            self.operators += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return out


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Counts and formulas at several sizes, and the formulas at the size of a large model."""
    table: dict[str, list[tuple[str, float, str]]] = {name: [] for name in FORMULAS}
    for sizes in SIZES[:2] if quick else SIZES:
        for name, counted in count(sizes).items():
            expected = FORMULAS[name](sizes)
            at = ", ".join(f"{key}={value}" for key, value in sizes._asdict().items())
            table[name] += [(at, counted, f"counted; formula {expected:,.0f}; {100 * (expected / counted - 1):+.1f}%")]
    for name, lines in table.items():
        report.numbers("scaling", name, lines)
    for D in (2048, 7168):
        sizes = Sizes(61, 256, D, 8, 4096)
        at = ", ".join(f"{key}={value}" for key, value in sizes._asdict().items())
        report.numbers("scaling", f"by the formulas, one of 2048 ranks at {at}", projected(sizes, 2048))


# Assumed rates of one rank, not measured.
LINK = 50e9  # bytes/s, 400 Gbit/s
MEMORY = 4.8e12  # bytes/s, the data sheet of an H200
BF16, FP32 = 400e12, 50e12  # FLOP/s reached in products


def projected(s: Sizes, ranks: int) -> list[tuple[str, float, str]]:
    """Memory and time of one rank in a training step of one micro-batch per rank."""
    L, E, D, K, N = s
    ring = 2 * (ranks - 1) / ranks  # bytes that a ring all-reduce sends per byte reduced
    weights = 8 * L * E * D**2
    trace = FORMULAS["trace: bytes in the all-reduce"](s)
    experts, sums = 48 * L * K * N * D**2, 4 * L * E * K * N * D
    statistics = FORMULAS["statistics: bytes read and written"](s)
    loop = FORMULAS["loop: bytes read and written"](s)
    return [
        ("experts' weights", weights / 1e9, "billion, replicated"),
        ("with gradients and Adam's moments in float32", 16 * weights / 1e12, "TB"),
        ("all-reduce of their gradients", ring * 4 * weights / LINK, f"s at {LINK:.2g} bytes/s"),
        ("experts' products, forward and backward", experts / BF16, f"s at {BF16:.2g} FLOP/s"),
        ("kept for backward, in bfloat16", L * 20 * K * N * D / 1e9, "GB"),
        ("sums of outputs by kernels that read them once", 2 * L * K * N * D / MEMORY, f"s at {MEMORY:.2g} bytes/s"),
        ("sums of outputs by a selector", sums / FP32, f"s at {FP32:.2g} FLOP/s"),
        ("its mask, per layer", 8 * E * K * N / 1e9, "GB"),
        ("all-reduce of the trace", trace / 1e6, "MB"),
        ("time of this all-reduce", ring * trace / LINK, f"s at {LINK:.2g} bytes/s"),
        ("statistics", statistics / MEMORY, f"s at {MEMORY:.2g} bytes/s"),
        ("their operators", FORMULAS["statistics: operators"](s), ""),
        ("loop", loop / MEMORY, f"s at {MEMORY:.2g} bytes/s"),
        ("its operators", FORMULAS["loop: operators"](s), ""),
        ("its state", FORMULAS["loop: bytes of state"](s) / 1e6, "MB"),
        ("operators of the layers' experts in a loop", L * FORMULAS["layer: operators, a loop over experts"](s), ""),
        ("operators of the layers, experts grouped", L * FORMULAS["layer: operators, experts grouped"](s), ""),
        ("values named expert/* in a logged step", 5 * L * E, ""),
    ]


def count(s: Sizes) -> dict[str, float]:
    """Counts of one MoE layer's forward and backward, of the statistics of L layers and of the loop; see FORMULAS."""
    L, E, D, K, N = s
    config = GPTConfig(n_embd=D, n_head=1, n_exp=E, top_k=K, bias=False, chrono=ALL_ON)
    layer = MOELayer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02, generator=generator)
    x = torch.randn(1, N, D, generator=generator, requires_grad=True)
    bias = RouterBias(torch.zeros(E), torch.ones(()))

    def once():
        y, layer_trace = layer(x, bias, True)
        y.sum().backward()
        return layer_trace

    counted: dict[str, float] = {}
    for grouped, flops, operators in (
        (True, "layer: the same without the experts', grouped", "layer: operators, experts grouped"),
        (False, "layer: floating-point operations", "layer: operators, a loop over experts"),
    ):
        layer.experts.use_grouped_mm = grouped
        with FlopCounterMode(display=False) as products:
            once()
        with Traffic() as traffic:
            layer_trace = once()
        counted[flops], counted[operators] = products.get_total_flops(), traffic.operators

    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = layer(x, bias, True)
    counted["layer: bytes kept for backward"] = sum(kept.values())
    del y

    zeros = (torch.zeros(()),) * 3
    with Traffic() as traffic:
        trace = collect_trace(
            [layer_trace.routing] * L, ALL_ON, N, *zeros, outputs=[layer_trace.outputs] * L, logged=False
        )
    counted["statistics: operators"], counted["statistics: bytes read and written"] = traffic.operators, traffic.bytes
    loop = ChronoLoop(RouterState(L, E, ALL_ON), list(range(L)))
    with Traffic() as traffic:
        loop.step(trace)
    counted["loop: operators"], counted["loop: bytes read and written"] = traffic.operators, traffic.bytes
    counted["trace: bytes in the all-reduce"] = sum(x.numel() * x.element_size() for x in trace.present().values())
    state = [*loop.router_state.buffers(), *loop.coherence.buffers(), *loop.lifecycle.buffers()]
    counted["loop: bytes of state"] = sum(x.numel() * x.element_size() for x in state)
    return counted
