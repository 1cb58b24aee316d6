"""Resolve the settings `device` and `dtype`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from chronomoe.fuse import fusion
from trainer.distributed import World
from trainer.errors import UserError, first_line

Autocast = Callable[[], AbstractContextManager[object]]


def device_name(name: str) -> str:
    """The name of the device; 'auto' is CUDA if available, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def select_device(name: str, world: World | None = None) -> torch.device:
    """The device of that name ('auto': CUDA if available, else the CPU); with several ranks the rank's own GPU.

    Raises UserError if it is not available.
    """
    name = device_name(name)
    if name == "cuda" and world is not None and world.world_size > 1:
        name = f"cuda:{world.local_rank}"
        torch.cuda.set_device(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device={name!r} is not available here; use --device=cpu or --device=auto") from None
    return device


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype of forward; 'auto': bfloat16 or float16 on CUDA, else float32. Raises UserError if unsupported."""
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 else "float16" if device.type == "cuda" else "float32"
    if device.type != "cuda" and dtype != "float32":
        raise UserError(f"dtype={dtype!r} needs CUDA; on {device} use --dtype=float32")
    return dtype


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch use only deterministic algorithms. Enter it before the first matmul on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may pick another algorithm
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def kernel_fusion(
    compile: bool, fuse: bool, device: torch.device, world: World | None = None
) -> tuple[AbstractContextManager[object], list[str]]:
    """The context to train in, by the settings `compile` and `fuse`, and notes for the user.

    Raises UserError if `compile` is set and torch.compile does not work here. All ranks fuse, or none.
    """
    if not (compile or (fuse and device.type == "cuda")):
        return nullcontext(), []
    reason = None
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as e:  # of Dynamo, Inductor, Triton, a missing C compiler
        reason = f"{type(e).__name__}: {first_line(e)}"
    if compile and reason is not None:
        raise UserError(f"compile=True needs torch.compile, which failed: {reason}")
    (has_failed,) = (world or World()).all_reduce_max(int(reason is not None))
    if has_failed:
        why = reason or "on another rank"
        return nullcontext(), [f"kernels are not fused, so small steps take longer: torch.compile failed: {why}"]
    return fusion(), ["the first steps are slow, because torch.compile runs"]


def autocast_context(dtype: str, device: torch.device) -> Autocast:
    """The context to run forward in. On CUDA it also enables TF32 for float32 matmuls, as nanoMoE does."""
    if device.type != "cuda":
        return nullcontext
    torch.set_float32_matmul_precision("high")
    if dtype == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, dtype))
