"""The house stands: a file imports from floors below its own room, or from its own room; big libraries have few doors.

Imports inside functions and under TYPE_CHECKING count. A room is the first two parts of a name (`cpt.data`), or the
first where that is a package of its own (`cpt_kernels`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELVES = {"cpt": ROOT, "cpt_kernels": ROOT / "kernels", "cpt_launcher": ROOT / "launcher"}

FLOORS = {
    9: ["cpt.cli"],
    8: ["cpt_launcher", "cpt.versions", "cpt.benchmarks"],
    7: ["cpt.train", "cpt.planning", "cpt.report"],
    6: ["cpt.run"],
    5: ["cpt.engine"],
    4: ["cpt.methods", "cpt.checkpoint", "cpt.huggingface", "cpt.evaluation"],
    3: ["cpt.models", "cpt.data", "cpt.schedules"],
    2: ["cpt.lineage", "cpt.parallel"],
    1: ["cpt_kernels", "cpt.config", "cpt.observe", "cpt.progress", "cpt.tensor_writer"],
    0: ["cpt"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

DOORS = {
    "deepspeed": ("cpt.engine", "cpt.parallel", "cpt.benchmarks"),
    "transformers": ("cpt.huggingface", "cpt.data.prepare", "cpt.benchmarks"),
    "triton": ("cpt_kernels",),
}


def files() -> dict[str, Path]:
    """Every module of ours by name."""
    found = {}
    for package, shelf in SHELVES.items():
        for path in sorted((shelf / package).rglob("*.py")):
            parts = path.relative_to(shelf).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "cpt" else parts[0]


def imported(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name of module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            yield from ((node.lineno, word) for word in words)


def faults_of(source: str, module: str, is_package: bool = False, known: set[str] = frozenset()) -> list[str]:
    """Imports of a file that lead beside or up, or through a wall."""
    room, faults = room_of(module), []
    for line, name in imported(source, module, is_package, known):
        library, target = name.split(".")[0], room_of(name)
        doors = DOORS.get(library, ())
        if library in DOORS and not any(f"{module}.".startswith(f"{door}.") for door in doors):
            faults.append(f"{module}:{line}: {library} has its doors in {', '.join(doors)} only")
        if library not in SHELVES or target == room:
            continue
        if target not in FLOOR_OF or room not in FLOOR_OF:
            faults.append(f"{module}:{line}: {target if room in FLOOR_OF else room} stands on no floor")
        elif FLOOR_OF[target] >= FLOOR_OF[room]:
            faults.append(f"{module}:{line}: floor {FLOOR_OF[room]} must not import {name} of floor {FLOOR_OF[target]}")
    return faults


def test_every_file_imports_from_floors_below_and_through_the_doors():
    known = set(files())
    faults = []
    for module, path in files().items():
        faults += faults_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", known)
    assert faults == []


def test_every_room_stands_on_a_floor():
    assert {room_of(module) for module in files()} <= set(FLOOR_OF)


def test_the_files_are_found():
    assert {
        "cpt",
        "cpt.train",
        "cpt.data.prepare",
        "cpt.cli.train",
        "cpt_kernels.switch",
        "cpt_launcher.rendezvous",
    } <= set(files())


KNOWN = {"cpt.config", "cpt.data", "cpt.data.order", "cpt.run", "cpt.models.llama"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cpt.data.order", "import cpt.run"),
        ("cpt.data.order", "import cpt.run as r"),
        ("cpt.data.order", "from cpt.run import Run"),
        ("cpt.data.order", "from cpt import run"),
        ("cpt.data.order", "def f():\n    from cpt.engine import Engine"),
        ("cpt.data.order", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cpt.run"),
        ("cpt.data.order", "try:\n    import cpt.train\nexcept ImportError:\n    raise"),
        ("cpt.data.order", "from ..models import llama"),
        ("cpt.data.order", "from cpt.models.llama import Model"),
        ("cpt.data.order", "import importlib\nimportlib.import_module('cpt.run')"),
        ("cpt.config.read", "import cpt.observe.logs"),
        ("cpt_kernels.adamw", "import cpt.config"),
        ("cpt_kernels.adamw", "import cpt_launcher.rendezvous"),
        ("cpt.train", "import cpt.report.page"),
        ("cpt_launcher.rendezvous", "import cpt.cli.train"),
        ("cpt.data.order", "import cpt.attic.box"),
        ("cpt.attic.box", "import cpt.config"),
        ("cpt.models.llama", "import transformers"),
        ("cpt.data.corpus", "from transformers import AutoTokenizer"),
        ("cpt.train", "import deepspeed.ops"),
        ("cpt.models.llama", "def f():\n    import triton.language as tl"),
    ],
)
def test_a_planted_import_is_caught(module, source):
    assert len(faults_of(source, module, known=KNOWN)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "cpt.data.order",
            "from cpt.config import Fault\nfrom cpt.data import order\nimport cpt.lineage.ledger, numpy",
        ),
        ("cpt.data.order", "from . import mixture\nfrom .prepare import x"),
        ("cpt.cli", "from cpt import __version__\nfrom cpt.run import Run\nimport cpt_launcher.rendezvous"),
        ("cpt.data.prepare.tokenizers", "import transformers"),
        ("cpt.huggingface.verify", "from transformers import AutoModelForCausalLM"),
        ("cpt.engine", "import deepspeed"),
        ("cpt_kernels.adamw", "import triton"),
        ("cpt.train", "import deepspeed_like, transformers_like"),
    ],
)
def test_a_right_import_is_let_through(module, source):
    assert faults_of(source, module, module in ("cpt.cli", "cpt.engine"), KNOWN) == []


def test_a_package_resolves_its_own_dots():
    assert faults_of("from . import order", "cpt.data", True, KNOWN) == []
    assert len(faults_of("from .. import run", "cpt.data.prepare", True, KNOWN)) == 0  # cpt.data.run: its own room
    assert len(faults_of("from ... import run", "cpt.data.prepare", True, KNOWN)) == 1
