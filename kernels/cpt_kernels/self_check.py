"""A twin against its plain definition on small random inputs, on the very device where it is to serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest error over the largest entry. A type of 16 bits is rounded a handful of times on the way.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def difference(
    serving: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Where `serving` leaves `definition` by more than rounding can; None if it does not.

    Both take inputs of these shapes, `definition` in fp32, and give one tensor; its entries and the gradients of all
    inputs are compared. Raises whatever `serving` raises, such as a compiler that fails here.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    wide = [tensor.float().requires_grad_() for tensor in inputs]
    expected = definition(*wide)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype).to(device)
    expected.backward(upstream.float())
    got = serving(*narrow)
    got.backward(upstream.to(got.dtype))
    pairs = [("output", got, expected)]
    pairs += [(f"gradient of input {i}", x.grad, y.grad) for i, (x, y) in enumerate(zip(narrow, wide, strict=True))]
    missing = next((name for name, mine, _ in pairs if mine is None), None)
    if missing:
        return f"{missing} is missing"
    return next(filter(None, (off_by(name, mine, theirs, dtype) for name, mine, theirs in pairs)), None)


def off_by(name: str, mine: Tensor, theirs: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """How far a result is from what it should be, if rounding in `dtype` is no reason for it; None if it is."""
    error = float((mine.detach().float() - theirs.detach()).abs().max() / theirs.detach().abs().max())
    if error <= TOLERANCES[dtype]:
        return None  # not a number is no agreement
    return f"{name} in {str(dtype).removeprefix('torch.')} is off by {error:.1e} of its largest entry"
