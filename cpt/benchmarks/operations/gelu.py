"""GELU of a micro-batch: the activation of Pythia's feed-forward layer, the exact one."""

from __future__ import annotations

from typing import Any

import torch

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import gelu

KERNEL, prepared = gelu, called
PEERS: dict[str, Peer] = {}


def serves(size: Size) -> bool:
    """Pythia's activation."""
    return size.is_pythia


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """hidden [T, M]."""
    return (random((size.tokens, size.mlp_width), dtype, device, seed),)


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Forward reads one and writes one; backward reads it and a gradient, and writes one."""
    entries = size.tokens * size.mlp_width * dtype.itemsize
    return Work(2 * entries), Work(3 * entries)
