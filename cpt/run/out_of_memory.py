"""Memory that a rank did not get: one line with what would need less, in place of a traceback, which stays in the log.

    torch says no --> traceback into the rank's log --> "rank 3: out of memory: ...; to need less: ..." --> status 1

While the model is built there is no log yet, and the line is all that is told. Another process may have had the memory,
so a supervisor tries again. What the kernel kills says nothing: the watch of the other ranks finds that.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpt.config import Fault
from cpt.observe.logs import keep_in_file
from cpt.parallel.mesh import Mesh
from cpt.run.settings import Run

# Of torch's allocator on a CPU; of a file that cannot be mapped; of CUDA and NCCL outside torch's allocator; of cuBLAS.
_SAID = ("DefaultCPUAllocator: ", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")


@contextmanager
def telling_of_memory(run: Run, mesh: Mesh) -> Iterator[None]:
    """Raise a passing Fault in place of an error of torch's, numpy's or Python's that says that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        keep_in_file(traceback.format_exception(error))
        said = next(iter(str(error).strip().splitlines()), type(error).__name__).partition(" See documentation")[0]
        raise Fault(
            f"out of memory: {said}; to need less: {', '.join(ways_out(run, mesh))}", is_passing=True
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so; torch has a class of its own only for what its allocator on a GPU refuses."""
    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or any(words in str(error) for words in _SAID)


def ways_out(run: Run, mesh: Mesh) -> list[str]:
    """Settings that need less memory than those of `run`, the cheapest first, and where to read what a rank holds."""
    ways = []
    micro_batch = run.batch.micro_batch_on(mesh.data_size)
    if micro_batch > 1:
        ways.append(f"batch.micro_batch: {_half_of(micro_batch)} in place of {micro_batch}")
    best = 1 if mesh.pipeline.size > 1 else 3
    if run.zero < best and mesh.same_parameters.size > 1:
        ways.append(f"zero: {best}")
    if run.recompute.mode != "full" or run.recompute.blocks is not None:
        ways.append("recompute: {mode: full}")
    ways.append("more ranks (`cpt plan CONFIG --ranks N` says what one holds)")
    return ways


def _half_of(micro_batch: int) -> int:
    """The largest number of windows that is at most half as many, and cuts a rank's share as evenly."""
    return next(size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0)
