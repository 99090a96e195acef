"""The end of a language model: hidden states to logits, or straight to losses.

B sequences, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpt.parallel.vocabulary import Beside
from cpt_kernels import Kernels
from cpt_kernels.cross_entropy import IGNORED


class Head(nn.Module):
    """Projects onto the vocabulary. A tied model hands in the embedding's own Parameter, which then has two owners."""

    def __init__(self, vocabulary: int, width: int, kernels: Kernels, tied_to: nn.Parameter | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.beside: Beside | None = None
        self.weight = nn.Parameter(torch.zeros(vocabulary, width)) if tied_to is None else tied_to

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """hidden [B, S, D] -> logits [B, S, V]; with targets [B, S] -> losses [B, S] in fp32.

        With something `beside`, in training, losses and what it makes of hidden states and weight, [B, S], 0 where a
        target is IGNORED; without targets that alone.
        """
        if targets is None:
            return functional.linear(hidden, self.weight) if self.beside is None else self.beside(hidden, self.weight)
        losses = self.kernels.linear_cross_entropy(hidden, self.weight, targets)
        if self.beside is None or not self.training:
            return losses
        return losses, self.beside(hidden, self.weight).masked_fill(targets == IGNORED, 0.0)
