"""Rotary positions of a micro-batch's queries and keys: all of a head in Llama, a quarter in Pythia."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, called, random
from cpt_kernels import rotary

KERNEL, prepared = rotary, called


def serves(size: Size) -> bool:
    """All models."""
    return True


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """queries [B, S, H, K], keys [B, S, G, K], angles [2, S, R/2] in fp32."""
    queries, keys = (
        random((size.windows, size.positions, heads, size.head_width), dtype, device, seed + i)
        for i, heads in enumerate((size.heads, size.kv_heads))
    )
    return queries, keys, rotary.table(size.positions, rotary.frequencies(size.rotary_width, 10000.0, device))


def work(size: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """What is turned is read and written; what is not could stay where it is."""
    turned = size.tokens * (size.heads + size.kv_heads) * size.rotary_width * dtype.itemsize
    angles = size.positions * size.rotary_width * 4
    return Work(2 * turned + angles), Work(2 * turned + angles)


def _liger() -> Callable[..., tuple[Tensor, Tensor]]:
    from liger_kernel.transformers.functional import liger_rope

    def turned(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        if 2 * angles.shape[-1] != queries.shape[-1]:
            raise ValueError("turns whole heads only")
        cosines, sines = (torch.cat((half, half), dim=-1)[None].to(queries.dtype) for half in angles)
        # It takes heads before positions, and writes over its inputs, which must not be ours.
        queries, keys = (x.transpose(1, 2).clone() for x in (queries, keys))
        return tuple(x.transpose(1, 2) for x in liger_rope(queries, keys, cosines, sines))

    return turned


PEERS = {"Liger-Kernel (with a copy)": Peer("liger-kernel", _liger, "cuda")}
