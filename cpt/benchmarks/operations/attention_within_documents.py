"""Causal attention of a micro-batch that does not leave a document."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, called
from cpt.benchmarks.operations import attention as across
from cpt_kernels import Documents, attention

KERNEL, prepared, serves = attention, called, across.serves


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """queries [B, S, H, K], keys and values [B, S, G, K], documents."""
    return *across.arguments(size, dtype, device, seed), documents_of(size).to(device)


def documents_of(size: Size) -> Documents:
    """Documents of random lengths, each token the first of one with the chance that gives their mean length."""
    draws = torch.rand(size.windows, size.positions, generator=torch.Generator().manual_seed(7))
    return Documents.from_starts(draws < 1 / size.document_tokens)


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """As across documents, for the squares of their lengths only."""
    return across.work_of_scores(size, dtype, documents_of(size).num_visible)


def _flash_attention_2() -> Callable[..., Tensor]:
    return _in_one_row(importlib.import_module("flash_attn").flash_attn_varlen_func)


def _flash_attention_3() -> Callable[..., Tensor]:
    return _in_one_row(importlib.import_module("flash_attn_interface").flash_attn_varlen_func)


def _in_one_row(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """All windows one after the other, as flash-attention's varlen functions take them."""

    def mixed(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
        bounds, longest = documents.cu_seqlens, documents.longest
        flat = (x.flatten(0, 1) for x in (queries, keys, values))
        outcome = function(*flat, bounds, bounds, longest, longest, causal=True)
        return (outcome[0] if isinstance(outcome, tuple) else outcome).view(queries.shape)

    return mixed


PEERS = {
    "flash-attn 2, varlen": Peer("flash-attn", _flash_attention_2, "cuda"),
    "flash-attn 3, varlen": Peer("flash-attn-3", _flash_attention_3, "cuda"),
}
