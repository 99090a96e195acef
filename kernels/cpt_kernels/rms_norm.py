"""Root-mean-square normalisation over the last dimension, with a learned scale.

D width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def plain(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + epsilon) * weight, all in fp32 at least and rounded once at the end.

    hidden [..., D], weight [D] -> [..., D] in the type of `hidden`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normal * weight).to(hidden.dtype)


def fused(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same through torch's rms_norm: one kernel on CUDA; on a CPU the same steps inside torch."""
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "torch": fused}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return fused, "torch (one kernel)" if device.type == "cuda" else "torch (as fast as plain here, and the same bits)"
