"""Root-mean-square normalisation over the last dimension, with a learned scale; alone, or of a sum with a residual.

D width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cpt_kernels import norms
from cpt_kernels.language import is_left_to_torch, why_not
from cpt_kernels.self_check import difference

# What it gives: the normal, and with a residual (normal, sum).
Outcome = Tensor | tuple[Tensor, Tensor]


def plain(hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """hidden / sqrt(mean(hidden^2) + epsilon) * weight, all in fp32 at least and rounded once at the end.

    hidden [..., D], weight [D] -> [..., D] in the type of `hidden`. With a residual, alike, it is the normal of their
    sum, which is rounded first: -> (normal, sum).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if residual is not None:
        total = hidden + residual
        return plain(total, weight, epsilon), total
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normal * weight).to(hidden.dtype)


def fused(hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """The same through torch's rms_norm: one kernel on CUDA; on a CPU the same steps inside torch."""
    if residual is not None:
        total = hidden + residual
        return fused(total, weight, epsilon), total
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


def triton(hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Outcome:
    """The same, one Triton kernel forward and one backward, the residual sum in it.

    Left to `plain`: float64, and what torch.compile traces.
    """
    if is_left_to_torch(hidden):
        return plain(hidden, weight, epsilon, residual)
    return norms.norm(hidden, residual, weight, None, epsilon)


TWINS: dict[str, Callable[..., Outcome]] = {"plain": plain, "torch": fused, "triton": triton}


def face(device: torch.device) -> tuple[Callable[..., Outcome], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type != "cuda":
        return fused, "torch (as fast as plain here, and the same bits)"
    reason = why_not(device)
    if reason:
        return fused, f"torch (one kernel; {reason})"
    return triton, "triton (one kernel each way, the residual sum in it)"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    shapes = [(37, 193), (37, 193), (193,)]
    for dtype in (torch.float32, torch.bfloat16):
        fault = difference(
            lambda x, r, w: torch.cat(triton(x, w, 1e-5, r)), lambda x, r, w: torch.cat(plain(x, w, 1e-5, r)),
            shapes, dtype, device,
        )  # fmt: skip
        if fault:
            return fault
    return None
