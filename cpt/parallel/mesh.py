"""The grid of ranks, handed over as an object: its axes are pipeline, data, sequence and tensor.

Today every rank is a data rank; the other axes are settings already so that a config says what it wants and is told
what it can have.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpt.config import Fault

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How the ranks are cut; data takes what remains."""

    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    timeout_seconds: int = 1800

    def faults(self) -> list[str]:
        """Axes that this version cannot cut along, a time-out that leaves no time."""
        late = [] if self.timeout_seconds >= 1 else [f"timeout_seconds = {self.timeout_seconds}: at least 1"]
        return late + [
            f"{axis} = {getattr(self, axis)}: this version cuts along data only; use 1"
            for axis in ("pipeline", "sequence", "tensor")
            if getattr(self, axis) != 1
        ]


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid.

    `device` is where this rank computes. `rank` and `size` count all ranks; `data_rank` and `data_size` those that
    see different windows of a batch.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        """This rank's place among those that see different windows."""
        return self.rank

    @property
    def data_size(self) -> int:
        """How many ranks see different windows."""
        return self.size

    @property
    def is_first(self) -> bool:
        """Whether this rank tells the story and writes the shared files."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place, and returned; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether `here` is true on some rank; the answer is the same on all."""
        return bool(self.sum(torch.tensor(int(here), device=self.device)).item() > 0)


def num_gpus() -> int:
    """GPUs of this machine that may be used: none if DeepSpeed was told to stay on the CPU."""
    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def threads_for(local_size: int) -> int:
    """CPU threads for one of `local_size` ranks of this machine: its share of the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // max(1, local_size))


@contextmanager
def open_mesh(
    settings: Settings, *, rank: int, size: int, local_rank: int, local_size: int, address: str, port: int
) -> Iterator[Mesh]:
    """Connect the ranks (NCCL with GPUs, gloo without) and part from them at the end.

    Raises Fault if the meeting point cannot be used: the port is taken, or the first rank cannot be reached.
    """
    on_gpu = num_gpus() > 0
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads_for(local_size))
    _settle_deepspeed(on_gpu, rank, size, local_rank, local_size, address, port)
    timeout = datetime.timedelta(seconds=settings.timeout_seconds)
    # new_group() takes its time-out from here and not from the call below; DeepSpeed makes groups of its own.
    dist.distributed_c10d.default_pg_timeout = timeout
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise Fault(
                f"port {port} on {address} is taken by another program; name a free one: "
                "deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"
            ) from None
        raise Fault(
            f"rank {rank} could not meet the others at {address}:{port}: {str(error).splitlines()[0]}"
        ) from None
    try:
        yield Mesh(rank, size, local_rank, device)
        # Parting while another rank still talks ends that one with a network error instead of its own.
        if size > 1:
            dist.barrier()
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()


def _settle_deepspeed(
    on_gpu: bool, rank: int, size: int, local_rank: int, local_size: int, address: str, port: int
) -> None:
    """Tell DeepSpeed what it would otherwise look for, before it is imported."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ["LOCAL_SIZE"] = str(local_size)  # without it ZeRO-3 on a CPU calls numactl at every reduction
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.ops

    # On a CPU, init_distributed() would compile a shared-memory all-reduce for a minute (and fail without a compiler);
    # it serves inference only.
    deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
