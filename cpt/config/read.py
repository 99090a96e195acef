"""From YAML files and key=value words to a frozen dataclass; every fault is found before any is told.

    files --yaml--> mapping --merge left to right--> mapping --key=value--> mapping --types--> settings

Types understood: int (also `300M`, `1.5B`, `64K`), float, bool, str, Path, Fraction (a share: `0.25`, `1/3` or `25%`),
Length (a share or tokens), Literal, Optional, a word or a type (`Literal["all"] | int`), tuple, dict, nested
dataclasses, and folders of choices.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from cpt.config.choices import name_of_choice, settings_of_choice
from cpt.config.faults import Fault, nearest
from cpt.config.length import Length
from cpt.config.yaml_text import from_yaml

_MULTIPLES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_mapping(words: Sequence[str], beneath: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One mapping from command-line words: YAML files merged left to right, then `key=value` and `a.b=value`.

    They are merged into a copy of `beneath`, if that is given.

    Raises Fault with all of: a file that is missing or is not YAML, a word that is neither file nor key=value.
    """
    faults: list[str] = []
    merged: dict[str, Any] = copy.deepcopy(dict(beneath or {}))
    for word in words:
        try:
            part = _read_assignment(word) if _is_assignment(word) else _read_file(Path(word))
            _merge(merged, part)
        except Fault as fault:
            faults.extend(fault.lines)
    if faults:
        raise Fault(faults)
    return merged


def _is_assignment(word: str) -> bool:
    try:
        return "=" in word and not Path(word).is_file()
    except OSError:  # a long value is no file name
        return True


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Fault(f"{path}: there is no such file; name a YAML file of settings, then key=value words") from None
    except IsADirectoryError:
        raise Fault(f"{path} is a folder; name a YAML file of settings, such as {path}/run.yaml") from None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Fault(f"{path} is not UTF-8 text: byte {error.start}; save it as UTF-8") from None
    try:
        loaded = from_yaml(text)
    except Fault as fault:
        raise Fault(f"{path}: {fault}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise Fault(f"{path}: settings are 'key: value' lines, this file holds a {type(loaded).__name__}")
    return loaded


def _read_assignment(word: str) -> dict[str, Any]:
    key, _, text = word.partition("=")
    if not key or not all(key.split(".")):
        raise Fault(f"{word}: write it as key=value, such as seed=2 or batch.windows=64")
    try:
        value: Any = from_yaml(text)
    except Fault:
        raise Fault(f"{word}: the value is not YAML; quote it, such as {key}='text'") from None
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(into: dict[str, Any], part: Mapping[str, Any], where: str = "") -> None:
    """Later wins; mappings are merged by key, an empty one empties; `list.0.key` reaches into a list that is there."""
    for key, value in part.items():
        old = into.get(key)
        if value and isinstance(value, dict) and isinstance(old, dict):
            if "name" in value and value["name"] != old.get("name") and "name" in old:
                into[key] = dict(value)  # another choice has other settings: nothing of the old one is kept
            else:
                _merge(old, value, _join(where, key))
        elif value and isinstance(value, dict) and isinstance(old, list) and all(str(k).isdecimal() for k in value):
            for index, item in ((int(k), v) for k, v in value.items()):
                place = f"{_join(where, key)}.{index}"
                if index >= len(old):
                    raise Fault(f"{place}: the list has {len(old)} entries, counted from 0")
                if isinstance(item, dict) and isinstance(old[index], dict):
                    _merge(old[index], item, place)
                else:
                    old[index] = item
        else:
            into[key] = value


def read_settings(kind: type, mapping: Mapping[str, Any], where: str = "") -> Any:
    """A `kind` filled from `mapping`, fields left out at their defaults.

    Asks every dataclass it makes for its own contradictions through `faults() -> list[str]`, where it has one.
    Raises Fault with every mistake at once: unknown names with near ones, wrong types, values that are missing or
    contradict one another.
    """
    faults: list[str] = []
    settings = _dataclass(kind, mapping, where, faults)
    if faults:
        raise Fault(faults)
    return settings


class _Wrong:
    """Stands where a value could not be read; its fault is on the list already."""


_WRONG = _Wrong()


def _dataclass(kind: type, mapping: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        faults.append(f"{where or 'settings'} = {mapping!r}: expected 'key: value' lines, got {_kind_of(mapping)}")
        return _WRONG
    hints = typing.get_type_hints(kind)
    fields = {_key_of(f): f for f in dataclasses.fields(kind) if f.init}
    values: dict[str, Any] = {}
    for key in mapping:
        if str(key) not in fields:
            faults.append(f"{_join(where, key)}: there is no such setting; {nearest(str(key), fields)}")
    for key, field in fields.items():
        place, hint = _join(where, key), hints[field.name]
        if key in mapping:
            folder = field.metadata.get("folder")
            values[field.name] = (
                _choice(folder, hint, mapping[key], place, faults)
                if folder
                else _value(hint, mapping[key], place, faults)
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"{place} is not set; it has no default")
            values[field.name] = _WRONG
    if any(value is _WRONG for value in values.values()):
        return _WRONG
    settings = kind(**values)
    if hasattr(settings, "faults"):
        faults.extend(_join(where, line) for line in settings.faults())
    return settings


def _key_of(field: dataclasses.Field) -> str:
    """The name of a field in a file: `from_` is written `from`, which Python keeps for itself."""
    return field.name.removesuffix("_")


def _choice(folder: str, hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    """Settings of one file of a folder of choices, or a tuple of such, as the field's type says."""
    if value is None and type(None) in typing.get_args(hint):
        return None
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            faults.append(f"{where} = {value!r}: expected a list of choices, each with a name")
            return _WRONG
        items = tuple(_choice(folder, Any, v, f"{where}.{i}", faults) for i, v in enumerate(value))
        return _WRONG if any(item is _WRONG for item in items) else items
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        faults.append(f"{where}: say which one by its name, such as {{name: ...}}; got {value!r}")
        return _WRONG
    try:
        kind = settings_of_choice(folder, str(value["name"]))
    except Fault as fault:
        faults.extend(_join(where, line) for line in fault.lines)
        return _WRONG
    return _dataclass(kind, {k: v for k, v in value.items() if k != "name"}, where, faults)


def _value(hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        words = [word for i in inner if typing.get_origin(i) is typing.Literal for word in typing.get_args(i)]
        others = [i for i in inner if i is not type(None) and typing.get_origin(i) is not typing.Literal]
        if value in words or not others:
            return _known(words, value, where, faults)
        if words and isinstance(value, str) and not _reads(others[0], value):
            faults.append(f"{where} = {value!r}: expected {' or '.join(words)}, or {_expected(others[0])}")
            return _WRONG
        return _value(others[0], value, where, faults)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where, faults)
    if origin is typing.Literal:
        return _known(inner, value, where, faults)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            faults.append(f"{where} = {value!r}: expected a list, got {_kind_of(value)}")
            return _WRONG
        items = tuple(_value(inner[0], v, f"{where}.{i}", faults) for i, v in enumerate(value))
        return _WRONG if any(item is _WRONG for item in items) else items
    if origin is dict:
        if not isinstance(value, Mapping):
            faults.append(f"{where} = {value!r}: expected 'name: value' lines, got {_kind_of(value)}")
            return _WRONG
        pairs = {
            _value(inner[0], k, f"a name in {where}", faults): _value(inner[1], v, _join(where, k), faults)
            for k, v in value.items()
        }
        if any(k is _WRONG for k in pairs):
            return _WRONG
        return _WRONG if any(v is _WRONG for v in pairs.values()) else pairs
    return _plain(hint, value, where, faults)


def _reads(hint: Any, value: Any) -> bool:
    """Whether a value can be read as that type."""
    found: list[str] = []
    _value(hint, value, "", found)
    return not found


def _expected(hint: Any) -> str:
    return _EXPECTED.get(hint, "a list")


def _known(names: Iterable[Any], value: Any, where: str, faults: list[str]) -> Any:
    if type(value) is not bool and value in names:
        return next(name for name in names if name == value)  # 1 where the file says 1.0
    faults.append(f"{where} = {value!r} is not known; {nearest(str(value), [str(n) for n in names])}")
    return _WRONG


def _plain(hint: type, value: Any, where: str, faults: list[str]) -> Any:
    try:
        return _READERS[hint](value)
    except (ValueError, TypeError, ArithmeticError):
        faults.append(f"{where} = {value!r}: expected {_EXPECTED[hint]}")
        return _WRONG


def _read_int(value: Any) -> int:
    if isinstance(value, str) and value and value[-1].upper() in _MULTIPLES:
        exact = Fraction(value[:-1].replace("_", "")) * _MULTIPLES[value[-1].upper()]
    elif isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(value)
    else:
        exact = Fraction(str(value).replace("_", ""))
    if exact.denominator != 1:
        raise ValueError(value)
    return int(exact)


def _read_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(value)
    return number


def _read_share(value: Any) -> Fraction:
    if isinstance(value, bool):
        raise TypeError(value)
    if isinstance(value, str) and value.endswith("%"):
        return Fraction(value[:-1].strip()) / 100
    return Fraction(str(value))


def _read_length(value: Any) -> Length:
    if isinstance(value, Length):
        return value
    if isinstance(value, str) and value[-1:].upper() in _MULTIPLES:
        return Length(tokens=_read_int(value))
    share = _read_share(value)
    is_share = 0 < abs(share) < 1 or (isinstance(value, str) and value.endswith("%"))
    return Length(share=share) if is_share else Length(tokens=_read_int(value))


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def _read_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(value)
    return str(value)


def _read_path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise TypeError(value)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise ValueError(value) from error


_READERS = {int: _read_int, float: _read_float, bool: _read_bool, str: _read_text, Path: _read_path,
            Fraction: _read_share, Length: _read_length}  # fmt: skip
_EXPECTED = {int: "a whole number, such as 2048 or 300M", float: "a number, such as 3e-4", bool: "true or false",
             str: "text, in quotes if it looks like a number", Path: "a path, in quotes if it looks like a number",
             Fraction: "a share, such as 0.25 or 25%",
             Length: "a share such as 1%, or tokens such as 20M"}  # fmt: skip


def as_mapping(settings: Any) -> Any:
    """The other way: plain mappings, lists and numbers that `read_settings` turns into equal settings."""
    if dataclasses.is_dataclass(settings):
        plain = {_key_of(f): as_mapping(getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.init}
        for field in dataclasses.fields(settings):
            if "folder" in field.metadata and plain[_key_of(field)] is not None:
                plain[_key_of(field)] = _with_names(getattr(settings, field.name))
        return plain
    if isinstance(settings, Mapping):
        return {key: as_mapping(value) for key, value in settings.items()}
    if isinstance(settings, (tuple, list)):
        return [as_mapping(value) for value in settings]
    if isinstance(settings, Path):
        return str(settings)
    if isinstance(settings, Length):
        return settings.plain
    if isinstance(settings, Fraction):
        # Written as a decimal where that is exact: 1/4 reads worse than 0.25.
        return float(settings) if Fraction(str(float(settings))) == settings else str(settings)
    return settings


def _with_names(choice: Any) -> Any:
    if isinstance(choice, tuple):
        return [_with_names(one) for one in choice]
    return {"name": name_of_choice(choice), **as_mapping(choice)}


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
