"""The end of a language model: hidden states to logits, or straight to losses.

B sequences, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpt_kernels import Kernels


class Head(nn.Module):
    """Projects onto the vocabulary. A tied model hands in the embedding's own Parameter, which then has two owners."""

    def __init__(self, vocabulary: int, width: int, kernels: Kernels, tied_to: nn.Parameter | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.zeros(vocabulary, width)) if tied_to is None else tied_to

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [B, S, D] -> logits [B, S, V]; with targets [B, S] -> losses [B, S] in fp32."""
        if targets is None:
            return functional.linear(hidden, self.weight)
        return self.kernels.linear_cross_entropy(hidden, self.weight, targets)
