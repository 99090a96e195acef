"""SwiGLU: the gate of Llama's feed-forward layer.

M feed-forward width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, entry by entry; gate and up [..., M] -> [..., M].

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return functional.silu(gate) * up


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return plain, "plain (no other twin yet)"
