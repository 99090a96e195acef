"""Causal self-attention with grouped queries: each position looks at itself and at all before it.

B sequences, S positions, H query heads, G key and value heads (H is a multiple of G), K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Measured with one thread of an AVX-512 CPU, forward and backward, B x H = 32, K = 32: at 128 positions in bf16 torch's
# fused attention took 10.0 ms and the plain one 3.8 ms; at 512 both took 48 ms; in fp32 the fused one always won.
_LONGEST_FOR_PLAIN_ON_CPU = 256


def plain(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V with every score written down; scores and softmax in fp32 at least.

    queries [B, S, H, K], keys and values [B, S, G, K] -> [B, S, H, K] in the type of the queries.
    """
    positions, heads, head_width = queries.shape[1:]
    repeats = heads // keys.shape[2]
    queries = queries.transpose(1, 2)  # [B, H, S, K]
    keys = keys.transpose(1, 2).repeat_interleave(repeats, dim=1)  # [B, H, S, K]
    values = values.transpose(1, 2).repeat_interleave(repeats, dim=1)  # [B, H, S, K]
    scores = queries @ keys.mT  # [B, H, S, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * head_width**-0.5
    is_later = torch.ones(positions, positions, dtype=torch.bool, device=queries.device).triu(diagonal=1)
    weights = scores.masked_fill(is_later, float("-inf")).softmax(dim=-1).to(values.dtype)
    return (weights @ values).transpose(1, 2)


def fused(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same through torch's scaled_dot_product_attention: memory grows with S, not with its square."""
    mixed = functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=True,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return mixed.transpose(1, 2)


def by_length(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """On a CPU: `plain` for short sequences in low precision, `fused` for the rest."""
    is_short = queries.shape[1] <= _LONGEST_FOR_PLAIN_ON_CPU
    serving = plain if is_short and queries.dtype in (torch.bfloat16, torch.float16) else fused
    return serving(queries, keys, values)


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "torch": fused}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type == "cpu":
        return by_length, f"plain to {_LONGEST_FOR_PLAIN_ON_CPU} positions in bf16, else torch (each the faster there)"
    return fused, "torch (scaled_dot_product_attention picks the fastest it has)"
