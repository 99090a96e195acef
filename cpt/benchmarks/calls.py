"""How long calls take: on a GPU by its own clock, with nothing left in its cache; on a CPU by the time of one thread.

All calls that are compared take turns, so that what disturbs the machine disturbs them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from cpt.benchmarks.measure import Reader, Spread, microseconds_a_sample

# More than any GPU keeps in its cache; writing it takes longer than Python needs to launch what is timed.
_FLUSHED_BYTES = 1 << 30
_CALLS_A_TURN = 5
# On a CPU, whose calls take milliseconds.
_SECONDS_A_TURN = 0.02
_MICROSECONDS_A_TURN = 200_000


def microseconds_of(calls: Sequence[Callable[[], object]], device: torch.device, repetitions: int) -> list[list[float]]:
    """Microseconds of each call in each of the alternating repetitions; calls were made before and are warm."""
    if device.type == "cuda":
        return _on_gpu(calls, device, repetitions)
    readers = [Reader("", _repeated(call)) for call in calls]
    return microseconds_a_sample(readers, repetitions, seconds_a_repetition=_SECONDS_A_TURN)


def _repeated(call: Callable[[], object]) -> Callable[[int], int]:
    def read(number: int) -> int:
        for _ in range(number):
            call()
        return number

    return read


def _on_gpu(calls: Sequence[Callable[[], object]], device: torch.device, repetitions: int) -> list[list[float]]:
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def once(call: Callable[[], object]) -> float:
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000

    numbers = [max(1, min(_CALLS_A_TURN, int(_MICROSECONDS_A_TURN / once(call)))) for call in calls]
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, number, values in zip(calls, numbers, taken, strict=True):
            values.append(statistics.median(once(call) for _ in range(number)))
    return taken


def bandwidth(device: torch.device, repetitions: int) -> Spread:
    """Bytes a second, read and written, that no cache holds: of a copy, or of changes in place where these are faster.

    On a CPU they are: a copy has to read what it will write over.
    """
    num_numbers = (1 << 29) if device.type == "cuda" else (1 << 25)
    source = torch.ones(num_numbers, device=device)
    target = torch.zeros_like(source)
    taken = microseconds_of([lambda: target.copy_(source), lambda: target.mul_(1.5)], device, repetitions)
    times = min(taken, key=statistics.median)
    return Spread.of([2 * source.nbytes / microseconds * 1e6 for microseconds in times])


def matmul_rate(device: torch.device, dtype: torch.dtype, repetitions: int) -> Spread:
    """FLOP/s of a large square product of random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    (times,) = microseconds_of([lambda: a @ b], device, repetitions)
    return Spread.of([2 * size**3 / microseconds * 1e6 for microseconds in times])


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that a call takes of the GPU's memory beside what is taken already; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
