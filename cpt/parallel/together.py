"""What one rank cannot do, all ranks learn of, and all end at once: the one that failed says why, the others nothing.

Without it a rank that fails alone leaves the others in their next sum, which ends with a network error or never.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpt.config import Fault
from cpt.parallel.mesh import Mesh

_log = logging.getLogger(__name__)

_FINE, _PASSING, _FAULT = range(3)  # what failed is at once the exit status; a disk's error may pass, too


class OtherRankError(RuntimeError):
    """Another rank failed and tells why itself. `status`: what its process ends with, and so should this one."""

    is_everybodys = True

    def __init__(self, rank: int, status: int) -> None:
        super().__init__(f"rank {rank} failed and says why")
        self.status = status


@contextmanager
def together(mesh: Mesh) -> Iterator[None]:
    """Raise on all ranks if inside a Fault or an OSError was raised on some; every rank must come here.

    The first rank that failed raises its own, the others OtherRankError. There must be no collective inside.

    A Fault that some ranks find and others do not is of a machine, not of the request: it is passing. Not so if the
    first rank alone finds it, which may have done alone what there was to do.
    """
    failure: Fault | OSError | None = None
    try:
        yield
    except (Fault, OSError) as error:
        failure = error
    here = _FINE if failure is None else _FAULT if isinstance(failure, Fault) and not failure.is_passing else _PASSING
    of_ranks = torch.zeros(mesh.size, dtype=torch.int64, device=mesh.device)
    of_ranks[mesh.rank] = here
    statuses = mesh.sum(of_ranks).tolist()
    failed = [rank for rank, status in enumerate(statuses) if status != _FINE]
    if not failed:
        return
    if failed != [0] and len(failed) < mesh.size:
        statuses[failed[0]] = _PASSING
        if isinstance(failure, Fault):
            failure.is_passing = True
    if failure is not None and failed[0] == mesh.rank:
        raise failure
    if failure is not None:
        _log.debug("rank %d failed too: %s", mesh.rank, failure)
    raise OtherRankError(failed[0], statuses[failed[0]])


@contextmanager
def alike(mesh: Mesh) -> Iterator[None]:
    """Let the first rank alone raise a Fault that all ranks find alike, because they agreed on it inside."""
    try:
        yield
    except Fault as fault:
        if mesh.is_first:
            raise
        raise OtherRankError(0, _PASSING if fault.is_passing else _FAULT) from None
