"""Several ranks under torchrun.

DDP averages gradients and one all-reduce sums the trace. This file does the rest: it joins the process group, and
agrees between hosts when to stop and when to save.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import UserError, first_line
from trainer.memory import one_line_out_of_memory

TIMEOUT = datetime.timedelta(minutes=10)  # of the rendezvous, and of one rank waiting for another within a step
PATIENCE = 10  # seconds of waiting for other ranks to join, before a line says so
CONTROL_TIMEOUT = datetime.timedelta(hours=3)  # while rank 0 prepares or checks the data


class World:
    """This process among `world_size` ranks. With one rank, collectives return their input."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        # collectives between hosts: on the GPU's backend each would synchronize with the device
        self.control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if world_size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and logs."""
        return self.rank == 0

    def wrap_ddp(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap the model in DistributedDataParallel; returns it unchanged with one rank."""
        if self.world_size == 1:
            return model
        # Do not broadcast buffers in forward: every rank computes the same state, and a broadcast would hide a
        # difference. DDP broadcasts them once, in its constructor. torch 2.13 renamed the argument.
        names = inspect.signature(DistributedDataParallel).parameters
        no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, **{no_broadcast: False})  # type: ignore[arg-type]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Maximum of each number over ranks, between hosts: it does not synchronize with a GPU."""
        if self.world_size == 1:
            return [int(n) for n in numbers]
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.control)


def torchrun_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment. Raises UserError if it is incomplete."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return 0, 1, 0
    try:
        return int(os.environ["RANK"]), int(world_size), int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError):
        raise UserError(
            f"WORLD_SIZE={world_size} but RANK and LOCAL_RANK are not both numbers: start ranks with torchrun, "
            "or unset WORLD_SIZE"
        ) from None


def torchrun_id() -> str | None:
    """Identifies this torchrun command, the same in all its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"


@contextlib.contextmanager
def process_group(device_type: str, backend: str) -> Iterator[World]:
    """Initialize the process group, if there are several ranks, and destroy it on exit.

    backend: torch.distributed's backend between GPUs; between CPUs it is gloo. Raises UserError if the ranks cannot
    join.
    """
    rank, world_size, local_rank = torchrun_environment()
    if world_size == 1:
        yield World()
        return
    if not device_type.startswith("cuda"):
        backend = "gloo"
    elif ":" in device_type:
        raise UserError(
            f"device={device_type!r} is one GPU for {world_size} ranks: use device='cuda', one GPU per rank"
        )
    elif backend == "nccl" and not dist.is_nccl_available():
        raise UserError("backend='nccl' is not in this build of torch; use --backend=gloo or --device=cpu")
    elif local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} needs GPU {local_rank} of its host, which has {torch.cuda.device_count()}: start no more "
            "ranks on a host than it has GPUs (--nproc_per_node)"
        )
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    waiting = f"rank {rank} of {world_size} waits for the other ranks at {place}, {TIMEOUT} at most\n"
    notice = threading.Timer(PATIENCE, sys.stderr.write, [waiting])
    notice.daemon = True
    notice.start()
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
        # with torch 2.11 torchrun's store survives a restart, with the keys of the earlier attempt
        attempt = dist.PrefixStore(  # type: ignore[attr-defined]
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=TIMEOUT)
        world = World(rank, world_size, local_rank)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"rank {rank} of {world_size} could not join the others: {first_line(e)}") from None
    finally:
        notice.cancel()
    try:
        yield world
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_line_errors(world: World) -> Iterator[None]:
    """Turn errors of memory and of the process group into UserErrors, and name the rank in those of other ranks."""
    rank = world.rank
    try:
        with one_line_out_of_memory():
            yield
    except UserError as e:
        raise UserError(f"rank {rank}: {e}" if rank > 0 else str(e)) from None
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        what = "timed out waiting for" if "timed out" in str(e).lower() else "lost"
        raise UserError(f"rank {rank} {what} the other ranks: the rank that ended first says why") from None
