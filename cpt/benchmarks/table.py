"""The result of `cpt bench data` as lines for the eye, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cpt.benchmarks.data import YARDSTICK, Result
from cpt.benchmarks.measure import Spread


def as_lines(result: Result) -> list[str]:
    """Two Markdown tables with a head and notes."""
    settings = result.settings
    lines = [
        f"Machine: {result.machine}",
        f"Versions: {', '.join(f'{name} {number}' for name, number in result.versions.items())}",
        "",
        f"Reading shuffled samples of {settings.sequence_length} + 1 tokens out of {settings.tokens:,}, CPU time of "
        f"one core, median (smallest to largest) of {settings.repetitions} alternating repetitions; times as fast as "
        f"{YARDSTICK}, by repetition",
        "",
    ]
    rows = [
        (
            rate.name,
            str(rate.batch or 1),
            f"{1e6 / rate.microseconds.median:,.0f}",
            _told(rate.microseconds),
            f"{_told(rate.speedup)}" if rate.speedup else "",
        )
        for rate in result.read_rates
    ]
    rows += [(package, "", reason, "", "") for package, reason in result.missing.items()]
    lines += _table(("reader", "batch", "samples/s", "microseconds a sample", "times as fast"), rows)
    lines += ["", f"Making ready a shuffled order over {settings.order_tokens:,} tokens, CPU time", ""]
    rows = [
        (
            start.name,
            _told(start.milliseconds),
            f"{start.index_bytes / 2**20:,.1f} MiB" if start.index_bytes else "none",
        )
        for start in result.start_ups
    ]
    return lines + _table(("order", "milliseconds", "index kept"), rows)


def as_json(result: Result) -> dict[str, Any]:
    """The result as `--json` writes it."""
    return dataclasses.asdict(result)


def _told(spread: Spread) -> str:
    median, smallest, largest = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        for value in (spread.median, spread.smallest, spread.largest)
    )
    return f"{median} ({smallest} to {largest})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [f"| {line} |" for line in lines]
