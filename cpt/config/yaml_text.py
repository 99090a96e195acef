"""YAML as its version 1.2 means it: `no` is a word, 5e8 a number, and a name that stands there twice is a mistake.

PyYAML speaks version 1.1, where a source called `no` (Norwegian) becomes false, 5e8 becomes text, a folder called
2024-01-05 a date, and the first of two equal names is dropped in silence. What is written here reads alike in both.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from cpt.config.faults import Fault

_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(~|null|Null|NULL|)$")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor(_TAG + "int", _Loader.construct_whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version would take for something else; never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def from_yaml(text: str) -> Any:
    """What a YAML text says; Fault with line and problem if it is none."""
    try:
        return _unshared(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Fault(f"line {line}: not YAML: {problem}") from None
    except RecursionError:
        raise Fault("not YAML for settings: something in it holds itself") from None
    except ValueError as error:  # a tag such as !!int before what is none
        raise Fault(f"not YAML: {error}") from None


def to_yaml(plain: Any) -> str:
    """Mappings, lists, text and numbers as YAML, in their order."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _unshared(plain: Any) -> Any:
    """A copy in which an anchor that is used twice is two things, so that changing one leaves the other."""
    if isinstance(plain, dict):
        return {key: _unshared(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_unshared(value) for value in plain]
    return plain
