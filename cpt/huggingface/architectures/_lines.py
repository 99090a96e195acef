"""What may be wrong with the lines of a config.json, told in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def no_numbers(config: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    """Lines that are missing, and lines that hold something other than a number."""
    faults = [f"{name} is missing" for name in needed if config.get(name) is None]
    there = {name: config[name] for name in (*needed, *optional) if config.get(name) is not None}
    return faults + not_numbers(there)


def not_numbers(lines: Mapping[str, Any]) -> list[str]:
    """Those of the lines that hold something other than a number."""
    return [f"{name} = {value!r}: expected a number" for name, value in lines.items() if not is_number(value)]


def is_number(value: Any) -> bool:
    """Whether JSON had a number there; true and false are none."""
    return type(value) in (int, float)


def flags(config: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Lines that are there and neither true nor false."""
    return [
        f"{name} = {config[name]!r}: expected true or false"
        for name in names
        if name in config and type(config[name]) is not bool
    ]


def other_than(config: Mapping[str, Any], only: Mapping[str, Any], model_name: str) -> list[str]:
    """Lines that say something other than the one thing that our model can do."""
    return [
        f"{name} = {config[name]}: our {model_name} has only {name} = {value}"
        for name, value in only.items()
        if config.get(name) is not None and config[name] != value
    ]


def told(config: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """A line of the config; a line that is left out or null is `otherwise`."""
    value = config.get(name)
    return otherwise if value is None else value
