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
    inputs are compared. What fails altogether is told too: a kernel that does not compile here.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    wide = [tensor.float().requires_grad_() for tensor in inputs]
    expected = definition(*wide)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype).to(device)
    expected.backward(upstream.float())
    try:
        got = serving(*narrow)
        got.backward(upstream.to(got.dtype))
    except Exception as error:  # whatever a compiler raises; it is told on
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    pairs = [("output", got, expected)]
    pairs += [(f"gradient of input {i}", x.grad, y.grad) for i, (x, y) in enumerate(zip(narrow, wide, strict=True))]
    for name, mine, theirs in pairs:
        told = f"{name} in {str(dtype).removeprefix('torch.')}"
        if mine is None:
            return f"{told} is missing"
        error = float((mine.detach().float() - theirs.detach()).abs().max() / theirs.detach().abs().max())
        if not error <= TOLERANCES[dtype]:  # not a number is no agreement either
            return f"{told} is off by {error:.1e} of its largest entry"
    return None
