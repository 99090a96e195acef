"""RMSNorm of a micro-batch's hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import rms_norm

KERNEL, prepared = rms_norm, called
_EPSILON = 1e-5


def serves(size: Size) -> bool:
    """Llama's norm."""
    return not size.is_pythia


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, D], weight [D], epsilon."""
    hidden = random((size.tokens, size.width), dtype, device, seed)
    return hidden, random((size.width,), dtype, device, seed + 1), _EPSILON


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads the states and writes as many; backward reads states and gradients and writes gradients."""
    states, weight = size.tokens * size.width * dtype.itemsize, size.width * dtype.itemsize
    return Work(2 * states + weight), Work(3 * states + 2 * weight)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in_place would write into the gradient that it is given, which others here are given too.
    return lambda hidden, weight, epsilon: liger_rms_norm(hidden, weight, epsilon, in_place=False)


def _apex() -> Callable[..., Tensor]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda hidden, weight, epsilon: fused_rms_norm_affine(hidden, weight, weight.shape, epsilon)


def _transformer_engine() -> Callable[..., Tensor]:
    from transformer_engine.pytorch import RMSNorm

    @functools.cache
    def module(width: int, epsilon: float, dtype: torch.dtype) -> torch.nn.Module:
        return RMSNorm(width, eps=epsilon, device="cuda", dtype=dtype)

    def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return functional_call(module(len(weight), epsilon, weight.dtype), {"weight": weight}, (hidden,))

    return norm


PEERS = {
    "Liger-Kernel": Peer("liger-kernel", _liger, "cuda"),
    "apex": Peer("apex", _apex, "cuda"),
    "Transformer Engine": Peer("transformer-engine", _transformer_engine, "cuda"),
}
