"""Settings of a benchmark that are options of its command: a field of the dataclass is a word of `cpt bench`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any


def option(default: Any, help: str, metavar: str = "N", is_positional: bool = False, shown: str = "") -> Any:
    """A dataclass field that is an option, described by `help`; True by default, it is turned off by `--no-NAME`.

    `shown`: the default as it is told, where that is not the value itself.
    """
    metadata = {"help": help, "metavar": metavar, "is_positional": is_positional, "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """An argument for each field of `settings`; one that is not given is not in the result."""
    for field in dataclasses.fields(settings):
        told = field.metadata
        shown = told["shown"] or (",".join(map(str, field.default)) if _is_list(field) else str(field.default))
        described = told["help"] if field.default in (None, False, True) else f"{told['help']} (default: {shown})"
        word = field.name.replace("_", "-")
        if isinstance(field.default, bool):
            name = f"--no-{word}" if field.default else f"--{word}"
            parser.add_argument(
                name, dest=field.name, action="store_const", const=not field.default, default=argparse.SUPPRESS,
                help=described,
            )  # fmt: skip
        elif told["is_positional"]:
            parser.add_argument(
                field.name, nargs="?", metavar=told["metavar"], default=argparse.SUPPRESS, help=described
            )
        else:
            parser.add_argument(
                f"--{word}", dest=field.name, metavar=told["metavar"], default=argparse.SUPPRESS, help=described
            )


def given_options(settings: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of the fields of `settings`, for `read_settings`; words between commas are a list."""
    given = {}
    for field in dataclasses.fields(settings):
        if field.name in arguments:
            value = arguments[field.name]
            given[field.name] = value.split(",") if _is_list(field) else value
    return given


def _is_list(field: dataclasses.Field) -> bool:
    return isinstance(field.default, tuple)
