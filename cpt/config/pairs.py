"""Settings side by side: a mapping within mappings as pairs of a whole name, `stages.0.tokens`, and a value."""

from __future__ import annotations

from typing import Any


def as_pairs(plain: Any, where: str = "") -> list[tuple[str, Any]]:
    """What mappings and lists hold, in their order; an empty one is a value. `where`: the name of the whole."""
    if isinstance(plain, dict) and plain:
        return [
            pair for key, value in plain.items() for pair in as_pairs(value, f"{where}.{key}" if where else str(key))
        ]
    if isinstance(plain, list) and plain:
        return [pair for index, value in enumerate(plain) for pair in as_pairs(value, f"{where}.{index}")]
    return [(where, plain)]
