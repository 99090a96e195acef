"""Compiles the kernels of cpt_kernels for a GPU that need not be there, and tells what the compiler made of them.

    TRITON_INTERPRET=0 python -m cpt_harness.compiling 90 [--all]     JSON: kernels that no file lists; a line a variant

In a process of its own: under the interpreter a kernel is no kernel.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import cpt_kernels
from cpt_kernels.language import Variant


def modules() -> list[ModuleType]:
    """Every file of the package."""
    names = [found.name for found in pkgutil.iter_modules(cpt_kernels.__path__)]
    return [importlib.import_module(f"cpt_kernels.{name}") for name in names]


def variants(capability: int, takes_all: bool) -> list[tuple[str, Variant]]:
    """(file.kernel, variant) of each kernel for these GPUs; without `takes_all` the first that is listed of each."""
    listed = {id(variant): variant for module in modules() for variant in getattr(module, "COMPILED", [])}
    found, seen = [], set()
    for variant in listed.values():
        name = _name(variant.kernel)
        if capability in variant.capabilities and (takes_all or name not in seen):
            seen.add(name)
            found.append((name, variant))
    return found


def unlisted(capability: int) -> list[str]:
    """Kernels that no variant launches and no other kernel calls."""
    kernels = {
        _name(kernel): kernel
        for module in modules()
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.fn.__module__.startswith("cpt_kernels.")
    }
    listed = {name for name, _ in variants(capability, takes_all=True)}
    called = {
        name
        for name, kernel in kernels.items()
        for other in kernels.values()
        if other is not kernel and re.search(rf"\b{kernel.fn.__name__}\(", other.src)
    }
    return sorted(set(kernels) - listed - called)


def compiled(variant: Variant, capability: int) -> dict[str, Any]:
    """What Triton and ptxas made of a variant: target, tensor-core instructions, shared memory, registers, stack."""
    names = variant.kernel.arg_names
    missing = set(names) - set(variant.signature) - set(variant.constants)
    assert not missing, f"neither in signature nor in constants: {missing}"
    types = {name: variant.signature.get(name, "constexpr").partition(":")[0] for name in names}
    constants = {name: value for name, value in variant.constants.items() if types[name] == "constexpr"}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if variant.signature.get(name, "").endswith(":16")
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    source = ASTSource(variant.kernel, types, constants, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "target": re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1),
        "tensor_core_instructions": len(re.findall(_TENSOR_CORE_INSTRUCTION[capability], ptx)),
        "shared_bytes": made.metadata.shared,
        **_resources(made.asm["cubin"]),
    }


# On Hopper the older instruction would reach half the speed.
_TENSOR_CORE_INSTRUCTION = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async"}


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.removeprefix('cpt_kernels.')}.{kernel.fn.__name__}"


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    words = {"registers": "REG", "stack_bytes": "STACK"}
    return {name: int(re.search(rf"\b{word}:(\d+)", told).group(1)) for name, word in words.items()}


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asked = int(sys.argv[1])
    _write({"unlisted": unlisted(asked)})
    for name, variant in variants(asked, "--all" in sys.argv):
        promised = {"uses_tensor_cores": variant.uses_tensor_cores, "most_spilled_bytes": variant.most_spilled_bytes}
        form = {name: str(value) for name, value in variant.constants.items()}
        _write({"kernel": name, "form": form, **promised, **compiled(variant, asked)})
