"""LayerNorm of the sum of a micro-batch's hidden states and its residual stream, which goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt.benchmarks.operations import layer_norm as alone
from cpt_kernels import layer_norm

KERNEL, prepared, serves = layer_norm, called, alone.serves


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, D], weight [D], bias [D], epsilon, residual [T, D]."""
    residual = random((size.tokens, size.width), dtype, device, seed + 3)
    return *alone.arguments(size, dtype, device, seed), residual


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads two and writes two; backward reads the sum and both gradients, and writes one for both inputs."""
    states, weight = size.tokens * size.width * dtype.itemsize, size.width * dtype.itemsize
    return Work(4 * states + 2 * weight), Work(4 * states + 3 * weight)


def _flash_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    def summed(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return layer_norm_fn(hidden, weight, bias, residual=residual, eps=epsilon, prenorm=True)

    return summed


PEERS = {"flash-attn's": Peer("flash-attn", _flash_attention, "cuda")}
