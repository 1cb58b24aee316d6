"""Refuse settings that cannot fit into memory, and report in one line that memory ran out.

The estimates are lower bounds of what a run needs, and the limits upper bounds of what it can get: a run that fits is
never refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.errors import UserError, first_line
from trainer.settings import Settings

# settings that memory grows with; a message names the one that matters most
SIZES = ("n_embd", "n_exp", "n_layer", "top_k", "batch_size", "block_size", "eval_iters")
WEIGHTS, TRAINING, ACTIVATIONS, LOSSES = (
    "weights",
    "weights, gradients and the optimizer's averages",
    "the activations of a micro-batch",
    "the losses of an evaluation",
)
ADVICE = (
    "lower batch_size and raise gradient_accumulation_steps by the same factor, or lower block_size, n_embd, n_layer "
    "or n_exp"
)
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def check_memory(s: Settings, vocab_size: int, device: torch.device) -> None:
    """Raise UserError, which names a setting to lower, if a run of these settings exceeds the memory of its device."""
    host = host_memory()
    if device.type == "cuda":
        # the model is initialized on the host
        _check(s, vocab_size, (WEIGHTS,), host, "this machine")
        total = torch.cuda.get_device_properties(device).total_memory
        _check(s, vocab_size, (TRAINING, ACTIVATIONS, LOSSES), total, str(device))
    else:
        _check(s, vocab_size, (TRAINING, ACTIVATIONS, LOSSES), host, "this machine")


def _check(s: Settings, vocab_size: int, parts: tuple[str, ...], limit: int, where: str) -> None:
    needs = least_memory(s, vocab_size)
    part = max(parts, key=lambda name: needs[name])
    if needs[part] <= limit:
        return
    # the setting that reduces the need the most if it is at its default
    defaults = {key: min(getattr(s, key), getattr(Settings, key)) for key in SIZES}
    smaller = {
        key: least_memory(dataclasses.replace(s, **{key: value}), vocab_size)[part] for key, value in defaults.items()
    }
    key = min(smaller, key=lambda key: smaller[key])
    what = f"{key}={getattr(s, key)}" if smaller[key] < needs[part] else "the model"
    raise UserError(f"{what} needs at least {in_words(needs[part])} for {part}; {where} has {in_words(limit)}")


def least_memory(s: Settings, vocab_size: int) -> dict[str, int]:
    """Lower bounds in bytes of what a run keeps in memory at one time, for each purpose."""
    weights = 4 * num_parameters(s, vocab_size)
    is_training = s.max_iters > 0 and not s.eval_only
    tokens = s.batch_size * s.block_size
    # Kept for backward, in each block: its input, query, key and value, and the hidden layer. Evaluation keeps nothing.
    experts = s.top_k if s.n_exp > 1 else 1
    per_token = s.n_embd * (s.n_layer * (4 + 4 * experts) if is_training else 1)
    return {
        WEIGHTS: weights,
        TRAINING: weights * (4 if is_training else 1),
        ACTIVATIONS: tokens * per_token * (4 if s.dtype in ("auto", "float32") else 2),
        LOSSES: 4 * s.eval_iters,
    }


def num_parameters(s: Settings, vocab_size: int) -> int:
    """Number of parameters of the model, without building it."""
    D, bias = s.n_embd, int(s.bias)
    mlp = 8 * D * D + bias * 5 * D
    attention = 4 * D * D + bias * 4 * D
    norm = (1 + bias) * D
    num_moe = -(-s.n_layer // s.stride) if s.n_exp > 1 else 0
    moe = s.n_exp * (mlp + D + s.use_noisy_top_k * D)
    blocks = s.n_layer * (attention + 2 * norm) + num_moe * moe + (s.n_layer - num_moe) * mlp
    return blocks + norm + (vocab_size + s.block_size) * D


def host_memory() -> int:
    """Physical memory and swap that this process can use, in bytes; its address space where there is no /proc."""
    try:
        text = (PROC / "meminfo").read_text()
    except OSError:
        return sys.maxsize
    total = {name: int(kib) << 10 for name, kib in re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", text, re.MULTILINE)}
    return min([total.get("MemTotal", sys.maxsize), *_cgroup_limits()]) + total.get("SwapTotal", 0)


def _cgroup_limits() -> Iterator[int]:
    """The memory limits, in bytes, of this process's control groups and of those that contain them."""
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, name = (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    # 'max', or no file: no limit
                    with contextlib.suppress(OSError, ValueError):
                        yield int((folder / name).read_text())


def in_words(size: int) -> str:
    """A number of bytes with three digits and its unit."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min((size.bit_length() - 1) // 10, len(units) - 1) if size else 0
    return f"{size / 1024**power:.3g} {units[power]}"


@contextlib.contextmanager
def one_line_out_of_memory(advice: str = ADVICE) -> Iterator[None]:
    """Turn the errors by which torch, numpy and Python report that memory ran out into a UserError with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        reason = out_of_memory(e)
        if reason is None:
            raise
        raise UserError(f"{reason}: {advice}") from None


def out_of_memory(e: BaseException) -> str | None:
    """How much memory was asked for, if this error says that memory ran out; else None."""
    text = first_line(e)
    if isinstance(e, torch.OutOfMemoryError):  # of CUDA
        return text.split(" Tried")[0].rstrip(". ")
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text)  # of torch on a CPU
    if asked:
        return f"out of memory, {in_words(int(asked[1]))} more were needed"
    return "out of memory" if isinstance(e, MemoryError) else None
