"""SwiGLU of a micro-batch: the gate between the products of Llama's feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import swiglu

KERNEL, prepared = swiglu, called


def serves(size: Size) -> bool:
    """Llama's activation."""
    return not size.is_pythia


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """gate and up, [T, M]."""
    shape = (size.tokens, size.mlp_width)
    return random(shape, dtype, device, seed), random(shape, dtype, device, seed + 1)


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads two and writes one; backward reads these two and a gradient, and writes two."""
    entries = size.tokens * size.mlp_width * dtype.itemsize
    return Work(3 * entries), Work(5 * entries)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu  # its backward pass writes the gradients over its inputs


PEERS = {"Liger-Kernel": Peer("liger-kernel", _liger, "cuda")}
