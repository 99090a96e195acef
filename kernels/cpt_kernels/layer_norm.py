"""Layer normalisation over the last dimension, with a learned scale and shift; alone, or of a sum with a residual.

D width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cpt_kernels import norms
from cpt_kernels.language import is_left_to_torch
from cpt_kernels.self_check import difference

# What it gives: the normal, and with a residual (normal, sum).
Outcome = Tensor | tuple[Tensor, Tensor]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """(hidden - mean) / sqrt(variance + epsilon) * weight + bias, all in fp32 at least and rounded once at the end.

    hidden [..., D], weight and bias [D] -> [..., D] in the type of `hidden`. With a residual, alike, it is the normal
    of their sum, which is rounded first: -> (normal, sum).
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if residual is not None:
        total = hidden + residual
        return plain(total, weight, bias, epsilon), total
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normal * weight + bias).to(hidden.dtype)


def fused(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """The same through torch's layer_norm: one kernel forward and one backward."""
    if residual is not None:
        total = hidden + residual
        return fused(total, weight, bias, epsilon), total
    return functional.layer_norm(hidden, weight.shape, weight, bias, epsilon)


def triton(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """The same, one Triton kernel forward and one backward, the residual sum in it.

    Left to `plain`: float64, and what torch.compile traces.
    """
    if is_left_to_torch(hidden):
        return plain(hidden, weight, bias, epsilon, residual)
    return norms.norm(hidden, residual, weight, bias, epsilon)


TWINS: dict[str, Callable[..., Outcome]] = {"plain": plain, "torch": fused, "triton": triton}


def face(device: torch.device) -> tuple[Callable[..., Outcome], str]:
    """What serves on this device when nothing is asked for, and why."""
    return fused, "torch (one kernel; triton is not measured yet)" if device.type == "cuda" else "torch (one kernel)"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    shapes = [(37, 193), (37, 193), (193,), (193,)]
    for dtype in (torch.float32, torch.bfloat16):
        fault = difference(
            lambda x, r, w, b: torch.cat(triton(x, w, b, 1e-5, r)),
            lambda x, r, w, b: torch.cat(plain(x, w, b, 1e-5, r)),
            shapes, dtype, device,
        )  # fmt: skip
        if fault:
            return fault
    return None
