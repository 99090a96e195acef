"""What is installed is ours and only ours, gets on with the PyPI package `kernels`, and is described where public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELVES = {"cpt": ROOT, "cpt_kernels": ROOT / "kernels", "cpt_launcher": ROOT / "launcher"}

STAND_IN = "STANDS_IN = True\n"

CHECK = """
import sys
import transformers, cpt, cpt_kernels, cpt_launcher, cpt.config
assert transformers.LlamaConfig().model_type == "llama"
import kernels
print(getattr(kernels, "STANDS_IN", None), *kernels.__path__, sep=chr(10))
"""


@pytest.mark.parametrize("has_init", [True, False])
def test_transformers_and_we_can_be_imported_beside_a_package_called_kernels(tmp_path, has_init):
    stand_in = tmp_path / "other" / "kernels"
    stand_in.mkdir(parents=True)
    (stand_in / ("__init__.py" if has_init else "module.py")).write_text(STAND_IN)
    path = [tmp_path / "other", ROOT, ROOT / "kernels", ROOT / "launcher"]
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{CHECK}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    flag, first, *_ = done.stdout.splitlines()
    assert flag == str(True if has_init else None)
    assert first == str(stand_in)


def installed() -> set[str]:
    """The packages that setup.py would install, asked of setup.py itself."""
    code = (
        "import setuptools, json\n"
        "setuptools.setup = lambda **named: print(json.dumps([named['packages'], named['package_dir']]))\n"
        "import runpy; runpy.run_path('setup.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    return set(ast.literal_eval(done.stdout)[0])


def test_only_names_that_begin_with_cpt_are_installed_and_all_of_those():
    there = {
        ".".join(path.parent.relative_to(shelf).parts)
        for package, shelf in SHELVES.items()
        for path in (shelf / package).rglob("__init__.py")
    }
    assert installed() == there
    assert {name.split(".")[0] for name in there} == set(SHELVES)


def test_every_folder_of_python_files_is_a_package():
    folders = {path.parent for package, shelf in SHELVES.items() for path in (shelf / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("shelf", ["kernels", "launcher", "configs", "tests", "docs"])
def test_a_shelf_is_no_package(shelf):
    assert not (ROOT / shelf / "__init__.py").exists()


def undescribed(path: Path, module: str) -> list[str]:
    """Public classes, functions and methods of a file, and the file itself, that have no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [] if ast.get_docstring(tree) else [module]

    def look(body: list[ast.stmt], where: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith(
                "_"
            ):
                if not ast.get_docstring(node):
                    found.append(f"{where}.{node.name}")
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{where}.{node.name}")

    look(tree.body, module)
    return found


def test_everything_public_has_a_docstring():
    missing = []
    for package, shelf in SHELVES.items():
        for path in sorted((shelf / package).rglob("*.py")):
            parts = path.relative_to(shelf).with_suffix("").parts
            if not any(p.startswith("_") and p != "__init__" for p in parts):
                missing += undescribed(path, ".".join(parts))
    assert missing == []


def test_something_undescribed_is_found(tmp_path):
    (tmp_path / "x.py").write_text(
        'class A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\n\ndef h():\n    "H."\n'
    )
    assert undescribed(tmp_path / "x.py", "x") == ["x", "x.A.f"]


def test_every_package_of_an_extra_has_a_version_that_the_tests_run_with():
    code = (
        "import setuptools, json\n"
        "setuptools.setup = lambda **named: print(json.dumps(named['extras_require']))\n"
        "import runpy; runpy.run_path('setup.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    asked = {word for extra in ast.literal_eval(done.stdout).values() for word in extra}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {word.split(">")[0] for word in asked} <= pinned
