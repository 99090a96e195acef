"""The grid of ranks, handed over as an object: its axes are pipeline, data, sequence and tensor.

Ranks that follow one another are a tensor group, which talks most, so that it stays within a machine; then come
sequence, data, and pipeline, which talks least. Data takes what the others leave:

    mesh: {pipeline: 2, tensor: 2} on 8 ranks    rank 0  1 | 2  3 || 4  5 | 6  7
                                     pipeline rank  0  0 | 0  0 || 1  1 | 1  1    other layers on each
                                         data rank  0  0 | 1  1 || 0  0 | 1  1    other windows of a batch on each
                                     sequence rank  0  0 | 0  0 || 0  0 | 0  0    other positions of a window on each
                                       tensor rank  0  1 | 0  1 || 0  1 | 0  1    other parts of a layer on each
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cpt.config import Fault
from cpt.parallel import watch as watching
from cpt.parallel.meeting import interface_towards, open_store
from cpt.parallel.watch import Watch

_log = logging.getLogger(__name__)

_AXES = ("pipeline", "data", "sequence", "tensor")  # ranks that follow one another differ in the last


@dataclass(frozen=True)
class Settings:
    """How the ranks are cut; data takes what remains.

    `blocks_of_parts`: how many of the model's blocks each part of the pipeline has; left out, so that the slowest part
    is as fast as can be.
    `sequence_parallel_norms`: each tensor rank has some positions of norms and of the residual stream, and not all;
    left out: with more than one tensor rank, where they divide the positions.
    `check_every_steps`: end the run if ranks that should hold the same weights or moments do not, to the bit; None:
    never look.
    """

    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    blocks_of_parts: tuple[int, ...] | None = None
    sequence_parallel_norms: bool | None = None
    timeout_seconds: int = 1800
    check_every_steps: int | None = None

    def faults(self) -> list[str]:
        """Axes without ranks, a time-out that leaves no time."""
        faults = [] if self.timeout_seconds >= 1 else [f"timeout_seconds = {self.timeout_seconds}: at least 1"]
        if self.check_every_steps is not None and self.check_every_steps < 1:
            faults.append(f"check_every_steps = {self.check_every_steps}: at least 1; leave it out to never look")
        sizes = {"pipeline": self.pipeline, "sequence": self.sequence, "tensor": self.tensor}
        return faults + [f"{axis} = {size}: at least 1" for axis, size in sizes.items() if size < 1]

    def faults_on(self, num_ranks: int, fits: Callable[[Settings], bool] = lambda settings: True) -> list[str]:
        """Why so many ranks cannot be cut like this, with values that would do; `fits`: what the model allows."""
        sizes = {"pipeline": self.pipeline, "sequence": self.sequence, "tensor": self.tensor}
        cut = {f"mesh.{axis}": size for axis, size in sizes.items() if size > 1}
        others = f"start a multiple of {self.ranks_of_a_replica} ranks"
        if num_ranks % self.ranks_of_a_replica == 0:
            return []
        if len(cut) == 1:
            ((name, size),) = cut.items()
            axis = name.removeprefix("mesh.")
            fitting = [n for n in divisors(num_ranks) if fits(dataclasses.replace(self, **{axis: n}))]
            use = f"use {one_of(fitting)}, or {others}" if fitting else others
            return [f"{name} = {size} cannot cut {num_ranks} ranks; {use}"]
        told = " x ".join(f"{name} = {size}" for name, size in cut.items())
        return [
            f"{told} = {self.ranks_of_a_replica} cannot cut {num_ranks} ranks; make their product "
            f"{one_of(divisors(num_ranks))}, or {others}"
        ]

    def shares_norms(self, sequence_length: int) -> bool:
        """Whether tensor ranks share the positions of norms, in windows of this length."""
        if self.sequence_parallel_norms is None:
            return self.tensor > 1 and sequence_length % (self.sequence * self.tensor) == 0
        return self.sequence_parallel_norms

    def faults_of_norms(self, sequence_length: int) -> list[str]:
        """Why norms cannot be shared as they are asked to be, in windows of this length, with what would do."""
        if not self.sequence_parallel_norms or min(self.sequence, self.tensor) < 1:
            return []
        name, ranks = "mesh.sequence_parallel_norms = true", self.sequence * self.tensor
        if self.tensor == 1:
            return [f"{name} with mesh.tensor = 1: it is the ranks of a tensor group that share norms; leave it out"]
        if sequence_length % ranks == 0:
            return []
        below = sequence_length // ranks * ranks
        fitting = [n for n in (below, below + ranks) if n >= 2]
        of_sequence = f" x mesh.sequence = {self.sequence}" if self.sequence > 1 else ""
        return [
            f"{name}: mesh.tensor = {self.tensor}{of_sequence} cannot share sequence_length = {sequence_length} "
            f"evenly; use {one_of(fitting)}, or leave it out"
        ]

    @property
    def ranks_of_a_replica(self) -> int:
        """Ranks that work together on the same windows."""
        return self.pipeline * self.sequence * self.tensor

    def told(self, num_ranks: int) -> str:
        """`pipeline 2 x data 4 x tensor 2`: the axes of so many ranks; data always."""
        sizes = {name: getattr(self, name, self.data_size(num_ranks)) for name in _AXES}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")

    def data_size(self, num_ranks: int) -> int:
        """How many of so many ranks see different windows."""
        return num_ranks // self.ranks_of_a_replica


@dataclass(frozen=True)
class Group:
    """The ranks along one axis: this rank's place among them, and how torch names them; None if it is alone."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid.

    `device` is where this rank computes. `rank` and `size` count all ranks. `pipeline`: the ranks whose layers follow
    one another. `data`: those that see different windows of a batch. `sequence`: those that share the positions of
    each window. `tensor`: those that share each layer. `replicas`: those that hold the same parameters, which is data
    and sequence together: what DeepSpeed calls data-parallel and ZeRO cuts over. `ends`: first and last of the
    pipeline, which share a tied embedding. `data` and `replicas` left out: all ranks. `watch`: takes signs of life.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    pipeline: Group = Group()
    sequence: Group = Group()
    tensor: Group = Group()
    ends: Group = Group()
    data: Group | None = None
    replicas: Group | None = None
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    @property
    def data_rank(self) -> int:
        """This rank's place among those that see different windows."""
        return self.data.rank if self.data else self.rank

    @property
    def data_size(self) -> int:
        """How many ranks see different windows."""
        return self.data.size if self.data else self.size

    @property
    def same_parameters(self) -> Group:
        """The ranks that hold the same parameters as this one: `replicas`, or all."""
        return self.replicas or Group(self.rank, self.size)

    @property
    def is_first(self) -> bool:
        """Whether this rank tells the story and writes the shared files."""
        return self.rank == 0

    @property
    def is_first_part(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pipeline.rank == 0

    @property
    def is_last_part(self) -> bool:
        """Whether this rank has the head, and so the losses."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def speaks_for_windows(self) -> bool:
        """Whether this rank is the first of those that work on its windows."""
        return self.pipeline.rank == self.sequence.rank == self.tensor.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place, and returned; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which those that work on the same windows have alike, summed over those that see different ones.

        In place, and returned: bit for bit the same on all ranks. Every rank must call it.
        """
        return self.sum(tensor if self.speaks_for_windows else tensor.zero_())

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def texts(self, here: str) -> list[str]:
        """What each rank has to say, by rank; every rank must call it."""
        if self.size == 1:
            return [here]
        said = torch.tensor(list(here.encode()), dtype=torch.int32, device=self.device)
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(said)
        longest = int(self.sum(lengths).max())
        of_ranks = torch.zeros(self.size, longest, dtype=torch.int32, device=self.device)
        of_ranks[self.rank, : len(said)] = said
        of_ranks = self.sum(of_ranks).cpu()
        return [bytes(row[:length].tolist()).decode() for row, length in zip(of_ranks, lengths.tolist(), strict=True)]

    def from_first(self, here: list[int]) -> list[int]:
        """The first rank's whole numbers, on all; every rank must call it."""
        if self.size == 1:
            return here
        return [int(word) for word in self.texts(" ".join(map(str, here)))[0].split()]

    def any(self, here: bool) -> bool:
        """Whether `here` is true on some rank; the answer is the same on all."""
        return bool(self.sum(torch.tensor(int(here), device=self.device)).item() > 0)


# One process by itself, for what is written for many.
ALONE = Mesh(0, 1, 0, torch.device("cpu"))


def divisors(number: int) -> list[int]:
    """All whole numbers that divide `number`, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def one_of(values: list[int]) -> str:
    """`1, 2 or 4`, for a fault; of many the largest eight."""
    told = [str(value) for value in values[-8:]]
    return " or ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)


def num_gpus() -> int:
    """GPUs of this machine that may be used: none if DeepSpeed was told to stay on the CPU."""
    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def threads_for(local_size: int) -> int:
    """CPU threads for one of `local_size` ranks of this machine: its share of the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // max(1, local_size))


@contextmanager
def open_mesh(
    settings: Settings,
    *,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    address: str,
    port: int,
    start: str = "",
    watch: watching.Settings | None = None,
) -> Iterator[Mesh]:
    """Connect the ranks (NCCL with GPUs, gloo without) and part from them at the end.

    `start`: what tells this start from others that may meet at the same port; all its ranks know it without talking.
    `watch`: how to find out who is gone or hangs meanwhile; None: nobody looks.

    Raises Fault if the ranks cannot be cut as the settings say, or if the meeting point cannot be used: the port is
    taken, the first rank cannot be reached, or others do not come.
    """
    if faults := settings.faults_on(size):
        raise Fault(faults)
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
    is_kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = open_store(
        address, port, rank, size, is_on_one_machine=size == local_size, is_kept_by_agent=is_kept_by_agent,
        seconds=settings.timeout_seconds, start=start,
    )  # fmt: skip
    signs = Watch(watch, rank, size)
    signs.open(store.clone() if size > 1 else None, ends_with_first=not is_kept_by_agent)
    try:
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
            )
        except dist.DistError as error:
            told = f"rank {rank} could not meet the others: {str(error).splitlines()[0]}"
            raise Fault(told, is_passing=True) from None
        with signs.guarding():
            yield _grid(settings, rank, size, local_rank, device, signs)
            # Parting while another rank still talks ends that one with a network error instead of its own.
            if size > 1:
                dist.barrier()
    finally:
        signs.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dist.is_initialized():
                dist.destroy_process_group()


def _grid(settings: Settings, rank: int, size: int, local_rank: int, device: torch.device, watch: Watch) -> Mesh:
    """The place of this rank, with the groups of its axes; every rank makes all groups, in the same order."""
    if settings.ranks_of_a_replica == 1:
        return Mesh(rank, size, local_rank, device, watch=watch)
    shape = (settings.pipeline, settings.data_size(size), settings.sequence, settings.tensor)
    ranks = torch.arange(size).view(shape)
    place = dict(zip(_AXES, (int(i) for i in (ranks == rank).nonzero()[0]), strict=True))

    def group(*axes: str) -> Group:
        """The ranks that differ from this one along these axes only."""
        others = [axis for axis in _AXES if axis not in axes]
        width = math.prod(shape[_AXES.index(axis)] for axis in axes)
        lists = ranks.permute([_AXES.index(axis) for axis in (*others, *axes)]).reshape(-1, width).tolist()
        handle, _ = dist.new_subgroups_by_enumeration(lists)
        return Group(next(one.index(rank) for one in lists if rank in one), width, handle)

    groups = {axis: group(axis) for axis in _AXES if axis == "data" or shape[_AXES.index(axis)] > 1}
    replicas = groups["data"] if settings.sequence == 1 else group("data", "sequence")
    ends = groups.get("pipeline", Group())
    if settings.pipeline > 2:
        both = ranks[[0, -1]].view(2, -1).T.tolist()
        handle, _ = dist.new_subgroups_by_enumeration(both)
        is_end = place["pipeline"] in (0, settings.pipeline - 1)
        ends = Group(int(place["pipeline"] > 0), 2, handle) if is_end else Group()
    return Mesh(rank, size, local_rank, device, replicas=replicas, ends=ends, watch=watch, **groups)


def _settle_deepspeed(
    on_gpu: bool, rank: int, size: int, local_rank: int, local_size: int, address: str, port: int
) -> None:
    """Tell DeepSpeed what it would otherwise look for, before it is imported."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ["LOCAL_SIZE"] = str(local_size)  # without it ZeRO-3 on a CPU calls numactl at every reduction
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    # Or gloo listens at the address that this machine's name happens to have.
    if interface := interface_towards(address, port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed.ops

    # On a CPU, init_distributed() would compile a shared-memory all-reduce for a minute (and fail without a compiler);
    # it serves inference only.
    deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
