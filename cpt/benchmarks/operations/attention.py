"""Causal attention of a micro-batch, across documents; cuDNN and FlexAttention are among our own twins."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import attention

KERNEL, prepared = attention, called


def serves(size: Size) -> bool:
    """All models."""
    return True


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """queries [B, S, H, K], keys and values [B, S, G, K]."""
    return tuple(
        random((size.windows, size.positions, heads, size.head_width), dtype, device, seed + i)
        for i, heads in enumerate((size.heads, size.kv_heads, size.kv_heads))
    )


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Two products of half of all scores forward and five backward."""
    return work_of_scores(size, dtype, size.windows * size.positions**2)


def work_of_scores(size: Size, dtype: torch.dtype, num_squared: float) -> tuple[Work, Work]:
    """The same for documents whose lengths' squares sum up to `num_squared`, of which a causal mask leaves half."""
    product = 2 * size.heads * size.head_width * num_squared / 2
    queries, keys = (size.tokens * heads * size.head_width * dtype.itemsize for heads in (size.heads, size.kv_heads))
    # Backward: queries, output, its gradient, the queries' gradient; keys, values and their gradients.
    return Work(2 * queries + 2 * keys, 2 * product), Work(4 * queries + 4 * keys, 5 * product)


def _flash_attention_2() -> Callable[..., Tensor]:
    return functools.partial(importlib.import_module("flash_attn").flash_attn_func, causal=True)


def _flash_attention_3() -> Callable[..., Tensor]:
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def mixed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        outcome = function(queries, keys, values, causal=True)
        return outcome[0] if isinstance(outcome, tuple) else outcome

    return mixed


def _flash_attention_in_torch() -> Callable[..., Tensor]:
    def mixed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attention.fused(queries, keys, values)

    return mixed


def _transformer_engine() -> Callable[..., Tensor]:
    from transformer_engine.pytorch import DotProductAttention

    @functools.cache
    def module(heads: int, kv_heads: int, head_width: int) -> torch.nn.Module:
        return DotProductAttention(
            heads, head_width, kv_heads, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal"
        )

    def mixed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        made = module(queries.shape[2], keys.shape[2], queries.shape[3])
        return made(queries, keys, values).view(queries.shape)

    return mixed


PEERS = {
    "flash-attn 2": Peer("flash-attn", _flash_attention_2, "cuda"),
    "flash-attn 3": Peer("flash-attn-3", _flash_attention_3, "cuda"),
    "FlashAttention in torch": Peer("torch", _flash_attention_in_torch, "cuda"),
    "Transformer Engine": Peer("transformer-engine", _transformer_engine, "cuda"),
}
