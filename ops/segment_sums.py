"""Sums of the rows of each expert, without atomics and without reading the numbers of rows on the host.

    sums[w, e] = sum over the rows r of expert e of weights[w, r] * y[r]

On CUDA two Triton kernels read y once. The first one splits the rows into chunks of equal length, so its time does not
depend on how the rows are distributed over the experts. It writes a partial sum, or part, for each chunk and each
expert with rows in it. The second one adds the parts of each expert. Elsewhere the sums are a float32 matmul with a
matrix of E selectors.

Shapes: S rows sorted by expert, E experts, D model width, W weights per row.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch, macOS
    triton = None

# A program of the first kernel sums the rows of a chunk in BLOCK_WIDTH columns, BLOCK_ROWS rows at a time. Chunks are
# as long as gives about PROGRAMS programs, enough to fill a large GPU.
BLOCK_ROWS, BLOCK_WIDTH, PROGRAMS = 32, 128, 1024
# A program of the second kernel adds the parts of an expert in BLOCK_COLUMNS columns, BLOCK_PARTS parts at a time.
BLOCK_PARTS, BLOCK_COLUMNS = 64, 32


def segment_sums(weights: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's sums [W, E, D] of its rows of y [S, D] by weights [W, S], in the dtype of the weights.

    offsets [E] int32 is the end of each expert's rows; the last one is S. The sums carry no gradient. The order of
    summation depends on shapes and offsets only.
    """
    weights, y = weights.detach(), y.detach()
    # type(): fake tensors have no memory
    can_use_kernels = triton is not None and y.is_cuda and type(y) is Tensor and weights.dtype == torch.float32
    if can_use_kernels and (torch.compiler.is_compiling() or _kernels_work(y.get_device())):
        with torch.cuda.device(y.get_device()):
            return _by_kernels(weights.contiguous(), y.contiguous(), offsets.contiguous())
    return _by_selector(weights, y, offsets)


@functools.cache
def _kernels_work(device: int) -> bool:
    """Whether Triton can launch kernels on this GPU, for which it needs a C compiler and Python's headers."""
    one = torch.ones(1, 1, device=f"cuda:{device}")
    try:
        with torch.cuda.device(device):
            _by_kernels(one, one, one.view(1).int())
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        warnings.warn(f"sums per expert are computed as a matmul, because Triton failed: {reason}", stacklevel=2)
        return False
    return True


def _by_selector(weights: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """A row that is not finite makes the sums of all experts NaN, because it is multiplied by zeros."""
    with torch.autocast(weights.device.type, enabled=False):
        rows = torch.arange(len(y), dtype=offsets.dtype, device=y.device)
        experts = torch.searchsorted(offsets, rows, right=True)
        one_hot = experts.unsqueeze(-1) == torch.arange(len(offsets), device=y.device)  # [S, E]
        per_expert = one_hot.t() * weights.unsqueeze(1)  # [W, E, S]
        return (per_expert.flatten(0, 1) @ y.to(weights.dtype)).view(len(weights), len(offsets), -1)


def _by_kernels(weights: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """A row that is not finite changes the sums of its own expert only, because other experts' rows are not loaded."""
    (W, S), (E, D) = weights.shape, (len(offsets), y.shape[1])
    tiles = _ceil_div(D, BLOCK_WIDTH)
    chunk_rows = BLOCK_ROWS * max(1, _ceil_div(S * tiles, BLOCK_ROWS * PROGRAMS))
    chunks = max(1, _ceil_div(S, chunk_rows))
    # The part of chunk c and expert e is in slot c + e. No two parts share a slot: from one part to the next, in the
    # order of rows, c or e grows and neither falls.
    parts = weights.new_empty(chunks + E - 1, W, D)
    sums = weights.new_empty(W, E, D)
    shape = (chunk_rows, E, D, W, _power_of_2(E), _power_of_2(W))
    _sum_chunks[(tiles, chunks)](weights, y, offsets, parts, S, *shape, BLOCK_ROWS, BLOCK_WIDTH)
    _add_parts[(_ceil_div(D, BLOCK_COLUMNS), E)](parts, offsets, sums, *shape, BLOCK_PARTS, BLOCK_COLUMNS)
    return sums


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _sum_chunks(
    weights,
    y,
    offsets,
    parts,
    S,
    chunk_rows,
    E: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    PADDED_E: tl.constexpr,
    PADDED_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Program (t, c) writes the parts of chunk c in the columns of tile t."""
    chunk = tl.program_id(1)
    w = tl.arange(0, PADDED_W)[:, None, None]
    r = tl.arange(0, BLOCK_ROWS)[None, :, None]
    d = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, None, :]
    e = tl.arange(0, PADDED_E)
    ends = tl.load(offsets + e, mask=e < E, other=2147483647)
    row = chunk * chunk_rows
    stop = tl.minimum(row + chunk_rows, tl.load(offsets + E - 1))
    while row < stop:  # over the experts that have rows here
        expert = tl.sum((ends <= row).to(tl.int32))
        end = tl.minimum(tl.load(offsets + expert), stop)
        at = y + row.to(tl.int64) * D
        total = tl.zeros([PADDED_W, BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        for first in range(0, end - row, BLOCK_ROWS):
            own = first + r < end - row
            values = tl.load(at + (first + r) * D + d, mask=own & (d < D), other=0.0)
            factors = tl.load(weights + w * S + row + first + r, mask=own & (w < W), other=0.0)
            total += factors * values.to(tl.float32)
        at = parts + (chunk + expert) * W * D + w * D + d
        tl.store(at, tl.sum(total, 1, keep_dims=True), mask=(w < W) & (d < D))
        row = end


@_jit
def _add_parts(
    parts,
    offsets,
    sums,
    chunk_rows,
    E: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    PADDED_E: tl.constexpr,
    PADDED_W: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (t, e) adds the parts of expert e in the columns of tile t."""
    e = tl.program_id(1)
    w = tl.arange(0, PADDED_W)[:, None, None]
    p = tl.arange(0, BLOCK_PARTS)[None, :, None]
    d = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    start, end = tl.load(offsets + e - 1, mask=e > 0, other=0), tl.load(offsets + e)
    first_chunk = start // chunk_rows
    count = tl.where(end > start, (end - 1) // chunk_rows - first_chunk + 1, 0)
    at = parts + (first_chunk + e) * W * D + w * D + d
    total = tl.zeros([PADDED_W, BLOCK_PARTS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, count, BLOCK_PARTS):
        total += tl.load(at + (first + p) * W * D, mask=(first + p < count) & (w < W) & (d < D), other=0.0)
    tl.store(sums + (w * E + e) * D + d, tl.sum(total, 1, keep_dims=True), mask=(w < W) & (d < D))
