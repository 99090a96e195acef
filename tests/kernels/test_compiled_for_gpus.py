"""Every Triton kernel of the package compiles for the GPUs it is made for, without any of them.

What the compiler makes says nothing of what a kernel computes: the other files of this folder do, in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cpt_kernels

ROOT = Path(__file__).parents[2]
# Shared memory that a block may have: A100, H100 and H200.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
TARGETS = {80: "sm_80", 90: "sm_90a"}


def compiled(capability: int, cache: Path, *words: str) -> list[dict]:
    pytest.importorskip("triton")
    folders = [ROOT / "tests/harness", Path(cpt_kernels.__file__).parents[1]]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        # As at a launch today; Triton asks for it to be said.
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    command = [sys.executable, "-m", "cpt_harness.compiling", str(capability), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fit(capability: int, lines: list[dict]) -> None:
    for line in lines:
        told = f"sm_{capability} {line}"
        assert line["target"] == TARGETS[capability], told
        assert line["shared_bytes"] <= SHARED_BYTES[capability], told
        assert line["stack_bytes"] <= line["most_spilled_bytes"], told
        assert bool(line["tensor_core_instructions"]) == line["uses_tensor_cores"], told


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.long), 90])
def test_each_kernel_compiles_in_its_most_usual_form(capability, pytestconfig):
    unlisted, *lines = compiled(capability, pytestconfig.cache.mkdir("triton"))
    assert unlisted == {"unlisted": []}, "list how they are launched in COMPILED of their file"
    assert len(lines) == len({line["kernel"] for line in lines}) > 3
    assert_fit(capability, lines)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_each_kernel_compiles_in_all_its_forms(capability, pytestconfig):
    _, *lines = compiled(capability, pytestconfig.cache.mkdir("triton"), "--all")
    assert_fit(capability, lines)
