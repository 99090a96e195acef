"""How many of what, for the eye."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """The number with its noun, `1 document` or `2,000 documents`."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"
