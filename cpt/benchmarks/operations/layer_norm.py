"""LayerNorm with bias of a micro-batch's hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import layer_norm

KERNEL, prepared = layer_norm, called
_EPSILON = 1e-5


def serves(size: Size) -> bool:
    """Pythia's norm."""
    return size.is_pythia


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, D], weight [D], bias [D], epsilon."""
    hidden = random((size.tokens, size.width), dtype, device, seed)
    weight, bias = (random((size.width,), dtype, device, seed + i) for i in (1, 2))
    return hidden, weight, bias, _EPSILON


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads the states and writes as many; backward reads states and gradients and writes gradients."""
    states, weight = size.tokens * size.width * dtype.itemsize, size.width * dtype.itemsize
    return Work(2 * states + 2 * weight), Work(3 * states + 3 * weight)


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm


def _apex() -> Callable[..., Tensor]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda hidden, weight, bias, epsilon: fused_layer_norm_affine(hidden, weight, bias, weight.shape, epsilon)


def _transformer_engine() -> Callable[..., Tensor]:
    from transformer_engine.pytorch import LayerNorm

    @functools.cache
    def module(width: int, epsilon: float, dtype: torch.dtype) -> torch.nn.Module:
        return LayerNorm(width, eps=epsilon, device="cuda", dtype=dtype)

    def norm(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        made = module(len(weight), epsilon, weight.dtype)
        return functional_call(made, {"weight": weight, "bias": bias}, (hidden,))

    return norm


PEERS = {
    "Liger-Kernel": Peer("liger-kernel", _liger, "cuda"),
    "apex": Peer("apex", _apex, "cuda"),
    "Transformer Engine": Peer("transformer-engine", _transformer_engine, "cuda"),
}
