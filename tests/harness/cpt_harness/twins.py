"""Twins of an operation against a float64 definition: which can run where, the same random inputs, and how close.

Without a GPU Triton's kernels run in its interpreter at small sizes, with one the same tests run there at real sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cpt_kernels.language import IS_INTERPRETED, why_not

# Largest error relative to the largest entry. bf16 keeps 8 bits: a handful of roundings on the way, and in Triton's
# interpreter they cut off.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")
# Larger tensors repeat so many: to draw 1e8 takes a thread 5 s, more than a GPU needs for a test of them. It is a prime
# number, so that no row is another one again.
_NUM_DRAWN = 2**22 - 3

# Where Triton's kernels can run: a test with `device` from here runs in the interpreter or on a GPU.
DEVICES = [
    pytest.param(CPU, id="interpreter", marks=pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))),
    pytest.param(
        torch.device("cuda"),
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def runnable(operation: ModuleType) -> list[Callable]:
    """The twins of an operation that can run on the CPU here."""
    return [serving for name, serving in operation.TWINS.items() if name != "triton" or not why_not(CPU)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same whatever the type."""
    number = math.prod(shape)
    drawn = torch.randn(min(number, _NUM_DRAWN), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if number > _NUM_DRAWN:
        drawn = drawn.repeat(-(-number // _NUM_DRAWN))[:number]
    return drawn.view(shape).to(dtype)


def assert_same_with_gradients(
    serving: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """Run both on the same rounded inputs, `definition` in float64; compare outputs and the gradients of all inputs."""
    narrow = [x.to(dtype).to(device).requires_grad_() for x in inputs]
    wide = [x.detach().to(torch.float64).requires_grad_() for x in narrow]
    got, expected = serving(*narrow), definition(*wide)
    weights = random(*expected.shape, seed=99).to(device)
    (got.to(torch.float64) * weights).sum().backward()
    (expected * weights).sum().backward()
    close(got, expected, dtype)
    for mine, theirs in zip(narrow, wide, strict=True):
        close(mine.grad, theirs.grad, dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Whether the largest error is within the type's tolerance; what is not a number never is."""
    error = float((got.detach().to(torch.float64) - expected.detach()).abs().max())
    # At real sizes, which only a GPU sees, thousands of numbers are added up.
    tolerance = TOLERANCES[dtype] * (5 if got.is_cuda else 1) * float(expected.detach().abs().max())
    tolerance += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # no number of fp16 is nearer to 0
    assert error <= tolerance, f"error {error:.2e}, above {tolerance:.0e}"
