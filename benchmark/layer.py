"""Time the MoE layer, forward and backward, with router and statistics; a dense MLP; and one-hot dispatch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmark import one_hot
from benchmark.grouped import GroupedLayer, gated_width
from benchmark.timing import Effort, Report, autocast, time_in_turns
from chronomoe import ChronoConfig, RouterBias, collect_trace
from chronomoe.fuse import fusion
from model import MLP, GPTConfig, MOELayer
from trainer.device import kernel_fusion

ALL_ON = ChronoConfig(router=True, coherence=True, beta=True, bridge=True, lifecycle=True)
PAIRS = [
    ("MoE layer, skewed", "MoE layer, balanced"),
    ("one-hot dispatch", "MoE layer, balanced"),
    ("MoE layer, balanced", "transformers, eager"),
    ("MoE layer, balanced", "transformers, grouped_mm"),
    ("MoE layer, balanced", "grouped layer"),
    ("MoE layer, not fused", "transformers, eager"),
    ("MoE layer, not fused", "transformers, grouped_mm"),
]
ROOT = Path(__file__).parent.parent
PROCESSES = 3
MAX_BYTES = 4 << 30  # one-hot dispatch is left out if one of its tensors is larger


def measure(report: Report, device: torch.device, effort: Effort, quick: bool) -> None:
    """Vary tokens, width, experts and top_k, one at a time, around N=4096, E=8, K=2 at D=128 and D=384."""
    if quick:
        shapes = [(1024, 128, 8, 2), (1024, 128, 64, 2)]
    elif device.type == "cuda":
        shapes = [(N, 768, 8, 2) for N in (1024, 4096, 16384)] + [(16384, 768, E, 2) for E in (16, 64)]
        shapes += [(16384, 768, 8, K) for K in (1, 4)] + [(16384, D, 8, 2) for D in (128, 384)]
    else:
        shapes = [(N, 128, 8, 2) for N in (1024, 2048, 4096, 8192, 16384)]
        shapes += [(4096, 128, E, 2) for E in (16, 64)] + [(4096, 128, 8, K) for K in (1, 4)]
        shapes += [(4096, 256, 8, 2), (4096, 384, 8, 2), (4096, 384, 64, 2), (16384, 384, 8, 2), (4096, 768, 8, 2)]
    for shape in shapes:
        if quick:
            answers = [timed(shape, device, effort)]
        else:
            part = Effort(effort.seconds / PROCESSES, 4, effort.most)
            answers = [timed_in_process(shape, device, part) for _ in range(PROCESSES)]
        compare(report, shape, answers)


def compare(report: Report, shape: tuple[int, int, int, int], answers: list[dict]) -> None:
    """Add the table of a shape (N, D, E, K), with the answers of `timed` from one or several processes."""
    N, D, E, K = shape
    skew = answers[0]["skew"]
    title = f"MoE layer, forward and backward: N={N}, D={D}, E={E}, K={K}"
    title += f"; skewed: the largest expert has {skew:.1f} times the mean load"
    report.comparison("layer", title, [answer["times"] for answer in answers], PAIRS, N=N, D=D, E=E, K=K, skew=skew)


def timed(shape: tuple[int, int, int, int], device: torch.device, effort: Effort) -> dict:
    """Time the competitors of a shape (N, D, E, K) in this process."""
    with kernel_fusion(compile=False, fuse=True, device=device)[0]:
        work, skew = competitors(*shape, device)
        return {"times": time_in_turns(work, device, effort), "skew": skew}


def timed_in_process(shape: tuple[int, int, int, int], device: torch.device, effort: Effort) -> dict:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmark.layer", json.dumps([shape, str(device), asdict(effort)])]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def competitors(N: int, D: int, E: int, K: int, device: torch.device) -> tuple[dict[str, Callable[[], None]], float]:
    """The competitors by name, the dense MLP first, and the largest load over the mean load of the skewed one.

    The dense MLP has K times the tokens, so it does as many multiplications. On CUDA it and the grouped layer are
    compiled, as the MoE layer's kernels are fused; the layers of transformers are not.
    """
    config = GPTConfig(n_embd=D, n_head=1, n_exp=E, top_k=K, bias=False, chrono=ALL_ON)
    generator = torch.Generator().manual_seed(0)
    dense, moe = MLP(config), MOELayer(config)
    with torch.no_grad():
        for p in (*dense.parameters(), *moe.parameters()):
            p.normal_(std=0.02, generator=generator)
    dense, moe = dense.to(device), moe.to(device)
    compiled = torch.compile if device.type == "cuda" else lambda module: module  # as the fused MoE layer is
    dense = compiled(dense)

    def tokens(n: int) -> tuple[Tensor, Tensor]:
        x, grad = (torch.randn(1, n, D, generator=generator).to(device) for _ in range(2))
        return x.requires_grad_(), grad

    (x, grad), (many, grad_of_many) = tokens(N), tokens(K * N)
    one = torch.ones((), device=device)
    even = RouterBias(torch.zeros(E, device=device), one)
    uneven = RouterBias(-torch.linspace(0, 3, E, device=device), one)
    with torch.no_grad():
        load = moe.router(x[0], uneven).tokens_per_expert
    zeros = (torch.zeros((), device=device),) * 3

    def both_passes(module: nn.Module, x: Tensor, grad: Tensor, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            for p in (x, *module.parameters()):
                p.grad = None
            with autocast(device):
                y = forward()
            y.backward(grad.to(y.dtype))

        return work

    def not_fused(bias: RouterBias) -> Tensor:
        with fusion(None):
            return chrono(bias)

    def chrono(bias: RouterBias, logged: bool = False) -> Tensor:
        y, (routing, _, outputs, _) = moe(x, bias, True)
        collect_trace([routing], ALL_ON, N, *zeros, outputs=[outputs], logged=logged)
        return y

    work = {
        "dense MLP": both_passes(dense, many, grad_of_many, lambda: dense(many)),
        "MoE layer, balanced": both_passes(moe, x, grad, lambda: chrono(even)),
        "MoE layer, skewed": both_passes(moe, x, grad, lambda: chrono(uneven)),
        "MoE layer, balanced, logged": both_passes(moe, x, grad, lambda: chrono(even, logged=True)),
    }
    if device.type == "cuda":
        work["MoE layer, not fused"] = both_passes(moe, x, grad, lambda: not_fused(even))
    if one_hot.bytes_of_largest(N, E, K) <= MAX_BYTES:
        work["one-hot dispatch"] = both_passes(moe, x, grad, lambda: one_hot.forward(moe, x, even, False)[0])
    grouped = compiled(GroupedLayer(D, E, K, generator).to(device))
    work["grouped layer"] = both_passes(grouped, x, grad, lambda: grouped(x))
    for implementation in ("eager", "grouped_mm"):
        if (block := mixtral(D, E, K, implementation, generator)) is not None:
            # autocast does not cover its grouped_mm
            block = block.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
            work[f"transformers, {implementation}"] = both_passes(block, x, grad, lambda block=block: block(x))
    return work, (load.max() / load.mean()).item()


def mixtral(D: int, E: int, K: int, implementation: str, generator: torch.Generator) -> nn.Module | None:
    """The Mixtral layer of Hugging Face transformers with nearly as many multiplications; None if not installed.

    It has no capacity and no statistics, and its router applies softmax before top-k.
    """
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    config = MixtralConfig(
        hidden_size=D, intermediate_size=gated_width(D), num_local_experts=E, num_experts_per_tok=K,
        experts_implementation=implementation,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.02, generator=generator)
    return block


if __name__ == "__main__":
    shape, device, effort = json.loads(sys.argv[1])
    print(json.dumps(timed(tuple(shape), torch.device(device), Effort(**effort))))
