"""RMSNorm of the sum of a micro-batch's hidden states and its residual stream, which goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt.benchmarks.operations import rms_norm as alone
from cpt_kernels import rms_norm

KERNEL, prepared, serves = rms_norm, called, alone.serves


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, D], weight [D], epsilon, residual [T, D]."""
    residual = random((size.tokens, size.width), dtype, device, seed + 2)
    return *alone.arguments(size, dtype, device, seed), residual


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads two and writes two; backward reads the sum and both gradients, and writes one for both inputs."""
    states, weight = size.tokens * size.width * dtype.itemsize, size.width * dtype.itemsize
    return Work(4 * states + weight), Work(4 * states + 2 * weight)


def _liger() -> Callable[..., tuple[Tensor, Tensor]]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def summed(hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return liger_fused_add_rms_norm(hidden, residual, weight, epsilon, in_place=False)

    return summed


def _flash_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    def summed(hidden: Tensor, weight: Tensor, epsilon: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_fn(hidden, weight, None, residual=residual, eps=epsilon, prenorm=True)

    return summed


PEERS = {
    "Liger-Kernel": Peer("liger-kernel", _liger, "cuda"),
    "flash-attn's": Peer("flash-attn", _flash_attention, "cuda"),
}
