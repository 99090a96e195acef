"""What the reports of all ranks before the first step mean together: faults, oddities, or one line that all is well."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import as_pairs

_SHOWN_LINES = 8  # of a kind


@dataclass(frozen=True)
class Report:
    """What one rank found. `wrong`: what it computed or received wrongly; `free`: bytes on the disk of the output."""

    node: str
    versions: dict[str, str]
    code: str
    settings: str
    clock: float
    free: int
    product_seconds: float
    sum_seconds: float
    wrong: str | None = None


def faults_between(of_ranks: Sequence[Report]) -> list[str]:
    """What is wrong on a rank, and what differs from the first one that must not."""
    first = of_ranks[0]
    lines = [
        f"rank {rank} on {report.node}: {report.wrong}; its processor, its memory or its network is faulty: "
        "leave the machine out, and have it tested"
        for rank, report in enumerate(of_ranks)
        if report.wrong
    ]
    for name in first.versions:
        lines += _differing(
            of_ranks, lambda report, name=name: report.versions[name], name, "install the same on all machines"
        )
    same_code = "start all ranks from the same checkout, and none while it is being updated"
    return lines + _differing(of_ranks, lambda report: report.code, "cpt's code with hash", same_code)


def slow_ranks(of_ranks: Sequence[Report], factor: float) -> list[str]:
    """Which ranks take so many times as long as the median rank for their matrices."""
    usual = statistics.median_low(report.product_seconds for report in of_ranks)
    return _shortened(
        f"rank {rank} on {report.node} is slow: its matrices take {report.product_seconds * 1e3:.1f} ms, those of the "
        f"median rank {usual * 1e3:.1f} ms (health.slow_factor = {factor:g}); all others wait for it in every step"
        for rank, report in enumerate(of_ranks)
        if report.product_seconds > factor * usual
    )


def odd_clocks(of_ranks: Sequence[Report], seconds: float) -> list[str]:
    """Whose clocks differ by more from the median."""
    now = statistics.median(report.clock for report in of_ranks)
    return _shortened(
        f"rank {rank} on {report.node}: its clock is {abs(report.clock - now):.0f} s "
        f"{'fast' if report.clock > now else 'slow'} (health.clock_seconds = {seconds:g}); times in logs will not fit"
        for rank, report in enumerate(of_ranks)
        if abs(report.clock - now) > seconds
    )


def odd_disks(of_ranks: Sequence[Report], num_bytes: int, output: Path) -> list[str]:
    """Who has no room for a checkpoint where the first rank has; of that one's disk the saves themselves warn."""
    first = of_ranks[0]
    return _shortened(
        f"rank {rank} on {report.node} has {report.free / 1e9:.1f} GB of room at {output}, less than a checkpoint of "
        f"{num_bytes / 1e9:.1f} GB, and rank 0 on {first.node} has more: is the folder the same on all machines?"
        for rank, report in enumerate(of_ranks)
        if report.free < num_bytes <= first.free
    )


def summary(of_ranks: Sequence[Report], num_operations: int, num_bytes: int) -> str:
    """One line when all is well. A product took so many operations, a sum over ranks had so many bytes."""
    rates = [num_operations / report.product_seconds / 1e9 for report in of_ranks]
    low, high = f"{min(rates):.0f}", f"{max(rates):.0f}"
    told = f"products are right, at {low if low == high else f'{low} to {high}'} GFLOP/s in fp32"
    if len(of_ranks) == 1:
        return f"checked this machine: {told}"
    nodes = len({report.node for report in of_ranks})
    spread = max(report.clock for report in of_ranks) - min(report.clock for report in of_ranks)
    return (
        f"checked {len(of_ranks)} ranks on {nodes} machine{'s' if nodes > 1 else ''}: same code, settings and "
        f"versions; {told}; a sum of {num_bytes >> 20} MiB takes "
        f"{max(report.sum_seconds for report in of_ranks) * 1e3:.1f} ms; clocks within {spread:.2f} s"
    )


def _differing(of_ranks: Sequence[Report], value: Callable[[Report], str], name: str, what_would_do: str) -> list[str]:
    """A line for each machine of which a rank has another value than the first rank."""
    first = of_ranks[0]
    others: dict[tuple[str, str], list[int]] = {}
    for rank, report in enumerate(of_ranks):
        if value(report) != value(first):
            others.setdefault((report.node, value(report)), []).append(rank)
    lines = [
        f"{_ranks(ranks)} on {node}: {name} {other}, but {value(first)} on rank 0 on {first.node}; {what_would_do}"
        for (node, other), ranks in others.items()
    ]
    return lines[:_SHOWN_LINES] + (
        [f"and so on {len(lines) - _SHOWN_LINES} more machines"] if lines[_SHOWN_LINES:] else []
    )


def differing_settings(settings: Sequence[Any], of_ranks: Sequence[Report]) -> list[str]:
    """Which settings, as each rank has read them, differ from those of the first one."""
    first, node = dict(as_pairs(settings[0])), of_ranks[0].node
    return _shortened(
        f"rank {rank} on {of_ranks[rank].node}: {key} = {other.get(key, 'not set')}, but "
        f"{first.get(key, 'not set')} on rank 0 on {node}; give all ranks the same files and the same words"
        for rank, other in enumerate(dict(as_pairs(theirs)) for theirs in settings)
        for key in sorted({**first, **other})
        if first.get(key) != other.get(key)
    )


def _shortened(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - _SHOWN_LINES
    return lines[:_SHOWN_LINES] + ([f"and {more} more like this"] if more > 0 else [])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
