"""Tables for the eye, in Markdown; and the part of a document that a command writes anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt.benchmarks.measure import Spread
from cpt.config import Fault


def told(spread: Spread) -> str:
    """`7.1 (6.9 to 10.5)`: median, smallest and largest with three digits."""
    median, smallest, largest = map(number, (spread.median, spread.smallest, spread.largest))
    return f"{median} ({smallest} to {largest})"


def number(value: float) -> str:
    """Three digits, or whole thousands with commas."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its columns one under the other."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [f"| {line} |" for line in lines]


def write_region(path: Path, name: str, lines: Sequence[str]) -> None:
    """Exchange what stands in `path` between the two marks of `name`; a file that is not there is made."""
    before, after = around_region(path, name)
    path.write_text("\n".join([before, *lines, after]), encoding="utf-8")


def around_region(path: Path, name: str) -> tuple[str, str]:
    """What stands in `path` up to and with the first mark of `name`, and from the second on.

    Raises Fault if the file is there and has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8") if path.exists() else f"{begin}\n{end}\n"
    before, is_begun, rest = text.partition(begin)
    _, is_ended, after = rest.partition(end)
    if not is_begun or not is_ended:
        raise Fault(f"{path} has no part between the lines {begin} and {end}; write them where the table is to stand")
    return before + begin, end + after
