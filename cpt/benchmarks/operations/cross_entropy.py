"""Linear cross-entropy of a micro-batch: hidden states and the head's weight to the mean loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cpt.benchmarks.operations import Peer, Size, Work, random
from cpt_kernels import cross_entropy

KERNEL = cross_entropy


def serves(size: Size) -> bool:
    """All models."""
    return True


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, D], weight [V, D], targets [T]."""
    hidden = random((size.tokens, size.width), dtype, device, seed)
    weight = random((size.vocabulary, size.width), dtype, device, seed + 1, scale=0.02)
    numbers = torch.Generator().manual_seed(seed + 2)
    return hidden, weight, torch.randint(size.vocabulary, (size.tokens,), generator=numbers).to(device)


def prepared(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    """The mean, because some of the others give no loss for each token."""
    return lambda: function(*arguments).mean()


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """A product forward and two backward; between them logits are written and read, their gradients read twice.

    The passes over logits do not hide behind the products. A kernel that keeps logits in registers can go below.
    """
    product = 2.0 * size.tokens * size.vocabulary * size.width
    logits = size.tokens * size.vocabulary * dtype.itemsize
    return Work(2 * logits, product, overlaps=False), Work(3 * logits, 2 * product, overlaps=False)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _torch() -> Callable[..., Tensor]:
    return functional.linear_cross_entropy


PEERS = {
    "Liger-Kernel": Peer("liger-kernel", _liger, "cuda"),
    "torch linear_cross_entropy": Peer("torch", _torch),
}
