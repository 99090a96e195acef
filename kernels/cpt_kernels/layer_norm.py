"""Layer normalisation over the last dimension, with a learned scale and shift.

D width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(hidden - mean) / sqrt(variance + epsilon) * weight + bias, all in fp32 at least and rounded once at the end.

    hidden [..., D], weight and bias [D] -> [..., D] in the type of `hidden`.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + epsilon)
    return (normal * weight + bias).to(hidden.dtype)


def fused(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """The same through torch's layer_norm: one kernel forward and one backward."""
    return functional.layer_norm(hidden, weight.shape, weight, bias, epsilon)


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "torch": fused}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return fused, "torch (one kernel)"
