"""Causal self-attention with rotary positions and grouped queries.

B sequences, S positions, D width, H query heads, G key and value heads, K head width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from cpt_kernels import Documents, Kernels

# Which of the four projections have a bias.
Biases = Literal["none", "qkv", "all"]


class Attention(nn.Module):
    """Four projections around the attention kernel; rows of `query`, `key` and `value` lie head by head."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, kernels: Kernels, biases: Biases = "none"
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.query = nn.Linear(width, heads * head_width, bias=biases != "none")
        self.key = nn.Linear(width, kv_heads * head_width, bias=biases != "none")
        self.value = nn.Linear(width, kv_heads * head_width, bias=biases != "none")
        self.mix = Mix(kernels)
        self.output = nn.Linear(heads * head_width, width, bias=biases == "all")

    def forward(self, hidden: Tensor, angles: Tensor, documents: Documents | None = None) -> Tensor:
        """hidden [B, S, D], angles [2, S, K/2] or [2, B, S, K/2] (see cpt_kernels.rotary) -> [B, S, D].

        With `documents` attention stays inside each.
        """
        queries = self.query(hidden).unflatten(-1, (-1, self.head_width))  # [B, S, H, K]
        keys = self.key(hidden).unflatten(-1, (-1, self.head_width))  # [B, S, G, K]
        values = self.value(hidden).unflatten(-1, (-1, self.head_width))  # [B, S, G, K]
        return self.output(self.mix(queries, keys, values, angles, documents).flatten(-2))


class Mix(nn.Module):
    """What happens between positions and nowhere else: queries and keys are turned, and each position looks at others.

    A layer of its own, without parameters, so that it can be exchanged where ranks share the positions of a window.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, angles: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """queries [B, S, H, K], keys and values [B, S, G, K] -> [B, S, H, K]; the rest as in `Attention`."""
        queries, keys = self.kernels.rotary(queries, keys, angles)
        return self.kernels.attention(queries, keys, values, documents)
