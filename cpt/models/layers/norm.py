"""Normalisation with learned scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpt_kernels import Kernels


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, width: int, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon
        self.kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.kernels.rms_norm(hidden, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """Normalisation by mean and deviation over the last dimension, with a learned shift too."""

    def __init__(self, width: int, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon
        self.kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.kernels.layer_norm(hidden, self.weight, self.bias, self.epsilon)
