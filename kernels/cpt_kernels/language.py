"""The one door to Triton, which is not installed everywhere: kernels are written with `jit` and `tl` from here.

With TRITON_INTERPRET=1 in the environment, before this file is imported, kernels run in Triton's interpreter: on any
device, slowly, and with bf16 that is wrong in sums and products (values must be widened right after they are loaded).

A file with kernels lists in `COMPILED` the forms in which it launches them, so that all of them can be compiled for
each GPU where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = tl = None

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Variant:
    """One form in which a kernel is launched.

    kernel: what `jit` gave. signature: type of each argument that is no constant, in Triton's words: "*bf16" a tensor,
    "i32", "fp32" numbers; with ":16" behind it where the address or the number is a multiple of 16, as Triton finds it
    out at a launch ("*bf16:16" for any tensor that torch allocated). constants: the others by name (an integer
    argument that is 1 is one of them to Triton: a stride of 1 belongs here). capabilities: the GPUs that are given this
    form. uses_tensor_cores: whether there is a product in it that must not fall back to plain arithmetic.
    most_spilled_bytes: what a thread may keep in memory for want of registers.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)
    uses_tensor_cores: bool = False
    most_spilled_bytes: int = 0


def jit(function: Callable) -> Any:
    """`function` as a Triton kernel, launched as kernel[grid](...); where there is no Triton, what it was."""
    return function if triton is None else triton.jit(function)


def why_not(device: torch.device) -> str | None:
    """What keeps Triton's kernels from running on `device`, in a few words; None if nothing does."""
    if triton is None:
        return "Triton is not installed"
    if IS_INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton has no {device.type}"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the GPU is older than sm_80"
    return None


def told() -> str:
    """Which Triton there is: a few words for the log."""
    if triton is None:
        return "without Triton"
    return f"Triton {triton.__version__}{', interpreted' if IS_INTERPRETED else ''}"


def with_near_columns(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it if entries of its last dimension are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def is_left_to_torch(tensor: Tensor) -> bool:
    """Whether a twin of a few operations entry by entry leaves them to torch: float64, and what torch.compile traces.

    The compiler fuses them with what is around them, and cannot look into a kernel.
    """
    return tensor.dtype is torch.float64 or torch.compiler.is_compiling()
