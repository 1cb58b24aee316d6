"""Sums per expert, against a loop over experts in float64. Triton's interpreter runs the kernels on the CPU."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ops import segment_sums as module
from ops.segment_sums import segment_sums
from tests.helpers.runs import ROOT

# Small blocks, so that few rows fill several chunks, blocks and parts
SMALL = dict(BLOCK_ROWS=8, BLOCK_WIDTH=32, BLOCK_PARTS=2, BLOCK_COLUMNS=16)
CONSTANTS = {name: getattr(module, name) for name in (*SMALL, "PROGRAMS")}


def case(sizes, D=24, W=2, dtype=torch.float32, programs=4, blocks=SMALL, seed=0):
    """Weights, y and offsets for experts with these numbers of rows, and the constants of the kernels."""
    generator = torch.Generator().manual_seed(seed)
    S = sum(sizes)
    weights = torch.rand(W, S, generator=generator) * (torch.rand(W, S, generator=generator) < 0.8)
    y = torch.randn(S, D, generator=generator).to(dtype)
    offsets = torch.tensor(sizes).cumsum(0).int()
    return SimpleNamespace(
        weights=weights, y=y, offsets=offsets, constants=CONSTANTS | blocks | dict(PROGRAMS=programs)
    )


def drawn_sizes(E, S, seed):
    """Row counts of E experts, S in total: most rows with few experts, many experts without rows."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(E, generator=generator) ** 6 * (torch.rand(E, generator=generator) < 0.6)
    shares[seed % E] += 0.01
    return torch.bincount(torch.multinomial(shares, S, True, generator=generator), minlength=E).tolist()


CASES = {f"{E} experts": case(drawn_sizes(E, 61, E), D=20 + E, seed=E) for E in range(1, 17)}
CASES |= {
    "no rows": case([0, 0, 0]),
    "one row": case([0, 1, 0], D=1),
    "all rows with the first expert": case([71, 0, 0, 0]),
    "all rows with the last expert": case([0, 0, 0, 71]),
    "one row per expert": case([1] * 13),
    "experts that end where a chunk ends": case([24, 24, 0, 24, 8]),
    "a chunk per block": case([40, 3, 0, 28], programs=1000),
    "one chunk": case([70, 3, 0, 58], programs=1),
    "one weight": case([9, 0, 40], W=1),
    "three weights": case([9, 0, 40], W=3),
    "bfloat16": case([9, 0, 40, 82], dtype=torch.bfloat16),
    "the constants of the module": case([9, 0, 200, 82], D=130, dtype=torch.bfloat16, programs=8, blocks={}),
}


def with_expert_not_finite(c, expert):
    """The case with an infinite and a NaN number in column 0, in the last two rows of this expert."""
    end, y = c.offsets[expert], c.y.clone()
    y[end - 1, 0], y[end - 2, 0] = torch.inf, torch.nan
    return SimpleNamespace(**vars(c) | dict(y=y))


def finite(c):
    return SimpleNamespace(**vars(c) | dict(y=c.y.nan_to_num(0, 0, 0)))


NOT_FINITE = {
    name: with_expert_not_finite(case([9, 2, 0, 40, 2, 17], **options), expert)
    for name, expert, options in (
        ("first", 0, {}),
        ("middle", 3, {}),
        ("last", 5, {}),
        ("all in one block", 1, dict(blocks={})),
        ("bfloat16", 4, dict(dtype=torch.bfloat16)),
    )
}

# Deterministic algorithms fill new tensors with NaN, so reading an unwritten part is seen.
INTERPRET = """
import sys, torch
from ops import segment_sums as module

torch.use_deterministic_algorithms(True)
results = {}
for name, (weights, y, offsets, constants) in torch.load(sys.argv[1]).items():
    for constant, value in constants.items():
        setattr(module, constant, value)
    results[name] = module._by_kernels(weights, y, offsets)
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Sums by the kernels, by the case's name. Another process, because Triton reads TRITON_INTERPRET at import."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 fails with numpy 2.4")
    cases = CASES | {f"not finite: {name}": c for name, c in NOT_FINITE.items()}
    cases |= {f"finite: {name}": finite(c) for name, c in NOT_FINITE.items()}
    path = tmp_path_factory.mktemp("segment_sums") / "cases.pt"
    torch.save({n: (c.weights, c.y, c.offsets, c.constants) for n, c in cases.items()}, path)
    command = [sys.executable, "-c", INTERPRET, str(path)]
    environment = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    return torch.load(path)


def by_loop(c):
    """Sums of weight * y in float64, and of |weight * y|."""
    ends, weights, y = c.offsets.tolist(), c.weights.double(), c.y.double()
    slices = [slice(start, end) for start, end in zip([0, *ends], ends)]
    return tuple(torch.stack([w[:, s] @ x[s] for s in slices], 1) for w, x in ((weights, y), (weights, y.abs())))


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_a_loop_over_experts(name, interpreted):
    expected, size = by_loop(CASES[name])
    assert interpreted[name].dtype == torch.float32
    assert ((interpreted[name] - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("name", NOT_FINITE)
def test_rows_that_are_not_finite_change_the_sums_of_their_expert_only(name, interpreted):
    c, found, expected = NOT_FINITE[name], interpreted[f"not finite: {name}"], interpreted[f"finite: {name}"]
    expert = (c.offsets <= c.y[:, 0].isnan().nonzero().item()).sum().item()
    assert (found != expected).nonzero().tolist() == [[w, expert, 0] for w in range(2)]
    assert not found[:, expert, 0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_selector_agrees_with_a_loop_over_experts(name, dtype):
    c = CASES[name]
    y = c.y.clone().requires_grad_()
    found = segment_sums(c.weights.to(dtype), y, c.offsets)
    expected, size = by_loop(c)
    assert found.dtype == dtype and not found.requires_grad
    assert ((found - expected).abs() <= (1e-6 if dtype == torch.float32 else 1e-14) * size).all()


def test_fake_tensors_need_no_kernel():
    with FakeTensorMode(), torch.device("cuda"):
        y = torch.empty(30, 24, dtype=torch.bfloat16, requires_grad=True)
        sums = segment_sums(torch.empty(2, 30), y, torch.empty(4, dtype=torch.int32))
    assert sums.shape == (2, 4, 24) and sums.dtype == torch.float32 and sums.device.type == "cuda"


@pytest.mark.parametrize("y", ["bf16", "fp32"])
def test_the_kernels_compile_for_a_gpu_without_atomics(y, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = dict(weights="*fp32", y=f"*{y}", offsets="*i32", parts="*fp32", sums="*fp32", S="i32", chunk_rows="i32")
    constants = dict(E=5, D=100, W=2, PADDED_E=8, PADDED_W=2) | CONSTANTS
    for kernel in (module._sum_chunks, module._add_parts):
        signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        constexprs = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature, constexprs)
        compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"] and not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
