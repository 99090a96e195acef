"""Rotary position embedding: turns pairs of query and key entries by an angle that grows with the position.

B sequences, S positions, H heads, K head width. Entry i is paired with entry i + K/2 ("half-split", as Llama and
GPT-NeoX weights expect it; not neighbours, as in the paper).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def frequencies(rotary_width: int, base: float, device: torch.device) -> Tensor:
    """Radians that each pair turns from one position to the next, [K/2] in fp32: from 1 down to almost 1 / base."""
    pairs = torch.arange(0, rotary_width, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (pairs / rotary_width)


def table(num_positions: int, turns_per_position: Tensor, amplitude: float = 1.0) -> Tensor:
    """Cosines and sines of all angles, [2, S, K/2], always fp32; each times `amplitude`.

    A function and not a module's buffer: whatever casts a model to bf16 would round the angles too, which moves
    position 2000 by several positions.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=turns_per_position.device)
    angles = torch.outer(positions, turns_per_position)
    return torch.stack((angles.cos(), angles.sin())) * amplitude


def plain(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions; computed in fp32 at least and rounded once at the end.

    queries [B, S, H, K], keys [B, S, G, K], angles [2, S, K/2] from `table`, or [2, B, S, K/2] where each window has
    positions of its own -> two of the same shapes and types. Fewer angles than K/2 turn the first entries of a head and
    leave the rest as they are.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    return _turn(queries, angles), _turn(keys, angles)


def _turn(vectors: Tensor, angles: Tensor) -> Tensor:
    cosines, sines = angles[..., None, :]  # [S, 1, K/2] each, or [B, S, 1, K/2]
    pairs = cosines.shape[-1]
    wide = vectors[..., : 2 * pairs].to(torch.promote_types(vectors.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    turned = turned.to(vectors.dtype)
    return turned if vectors.shape[-1] == 2 * pairs else torch.cat((turned, vectors[..., 2 * pairs :]), dim=-1)


TWINS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"plain": plain}


def face(device: torch.device) -> tuple[Callable[..., tuple[Tensor, Tensor]], str]:
    """What serves on this device when nothing is asked for, and why."""
    return plain, "plain (no other twin yet)"
