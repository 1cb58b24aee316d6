"""Several ranks under torchrun: who they are, and what they agree on.

Gradients are averaged by DDP, the trace is summed by one all-reduce; what is here is the rest: meeting, deciding
together on the host when to stop and save, and collecting what a checkpoint needs of every rank.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import UserError, first_line

TIMEOUT = datetime.timedelta(minutes=10)  # for the ranks to meet, and in a step for one to wait for the others
PATIENCE = datetime.timedelta(hours=3)  # for rank 0 to prepare or check the data


class Ranks:
    """This process among `count`. With one process every method does nothing, or returns what it was given."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0):
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        # decisions are taken between hosts: through a GPU each would wait for it
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None

    @property
    def first(self) -> bool:
        """The rank that writes and logs."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with its gradients averaged over ranks in backward."""
        if self.count == 1:
            return model
        # Buffers are not copied from rank 0 in forward: every rank computes the same, and a copy would hide it if one
        # did not. torch 2.13 has another name for that.
        names = inspect.signature(DistributedDataParallel).parameters
        no_copies = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, **{no_copies: False})

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks. Waits for the other hosts, not for a GPU."""
        if self.count == 1:
            return [int(n) for n in numbers]
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """x summed over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        if self.count == 1:
            return [value]
        found = [None] * self.count
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier(group=self.control)


def environment() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this host), as torchrun says. Raises UserError if it says half of it."""
    count = os.environ.get("WORLD_SIZE", "1")
    names = ("RANK", "LOCAL_RANK")
    if count == "1":
        return 0, 1, 0
    try:
        return int(os.environ["RANK"]), int(count), int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError):
        raise UserError(
            f"WORLD_SIZE={count} but {' and '.join(names)} are not both numbers: start ranks with torchrun, "
            "or unset WORLD_SIZE"
        ) from None


def job() -> str | None:
    """What names this torchrun, the same in all its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"


@contextlib.contextmanager
def joined(device_type: str, backend: str) -> Iterator[Ranks]:
    """Meet the other ranks, if there are any, and part at the end. Raises UserError if they cannot meet.

    backend: torch.distributed's for tensors on a GPU; on a CPU it is gloo.
    """
    rank, count, local_rank = environment()
    if count == 1:
        yield Ranks()
        return
    if not device_type.startswith("cuda"):
        backend = "gloo"
    elif ":" in device_type:
        raise UserError(
            f"device={device_type!r} is one GPU for {count} ranks: give device='cuda', and each takes its own"
        )
    elif backend == "nccl" and not dist.is_nccl_available():
        raise UserError("backend='nccl' is not in this build of torch; use --backend=gloo or --device=cpu")
    elif local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} needs GPU {local_rank} of its host, which has {torch.cuda.device_count()}: start no more "
            "ranks on a host than it has GPUs (--nproc_per_node)"
        )
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=TIMEOUT))
        # torchrun's own store outlives a restart, and what the earlier attempt left in it would be met again
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=TIMEOUT)
        ranks = Ranks(rank, count, local_rank)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"rank {rank} of {count} could not meet the others: {first_line(e)}") from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
