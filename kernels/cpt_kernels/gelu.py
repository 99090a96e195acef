"""GELU: the activation of GPT-NeoX's feed-forward layer, exact or by a tanh.

M feed-forward width; any number of dimensions before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def plain(hidden: Tensor, is_tanh: bool = False) -> Tensor:
    """x times the normal distribution function of x, [..., M] -> [..., M]; in fp32 at least, rounded once at the end.

    With `is_tanh` the function is replaced by (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, which differs by up to
    5e-4: weights trained with one must not be used with the other.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if is_tanh:
        share = torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        share = torch.erf(wide * math.sqrt(0.5))
    return (0.5 * wide * (1 + share)).to(hidden.dtype)


def fused(hidden: Tensor, is_tanh: bool = False) -> Tensor:
    """The same through torch's gelu: one kernel forward and one backward."""
    return functional.gelu(hidden, approximate="tanh" if is_tanh else "none")


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "torch": fused}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return fused, "torch (one kernel)"
