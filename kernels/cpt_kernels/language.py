"""The one door to Triton, which is not installed everywhere: kernels are written with `jit` and `tl` from here.

With TRITON_INTERPRET=1 in the environment, before this file is imported, kernels run in Triton's interpreter: on any
device, slowly, and with bf16 that is wrong in sums and products (values must be widened right after they are loaded).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = tl = None

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LEAST_CAPABILITY = (8, 0)


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
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the GPU is older than sm_80"
    return None
