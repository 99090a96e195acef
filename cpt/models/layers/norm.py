"""Normalisation with learned scales."""

from __future__ import annotations

from typing import Any

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

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """[..., D] -> [..., D]; with a residual alike, the normal of their sum: (normal, sum)."""
        return self.kernels.rms_norm(hidden, self.weight, self.epsilon, residual)


class LayerNorm(nn.Module):
    """Normalisation by mean and deviation over the last dimension, with a learned shift too."""

    def __init__(self, width: int, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon
        self.kernels = kernels

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """[..., D] -> [..., D]; with a residual alike, the normal of their sum: (normal, sum)."""
        return self.kernels.layer_norm(hidden, self.weight, self.bias, self.epsilon, residual)
