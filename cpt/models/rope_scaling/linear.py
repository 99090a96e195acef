"""All positions drawn together: position p counts as p / factor (position interpolation)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt.models.rope_scaling import below_one
from cpt_kernels import rotary


@dataclass(frozen=True)
class Settings:
    """`factor`: how many times further positions reach."""

    factor: float

    def scaled(self, rotary_width: int, base: float, num_positions: int, device: torch.device) -> tuple[Tensor, float]:
        """Every frequency divided by the factor. Source: Chen et al. 2023, arXiv:2306.15595."""
        return rotary.frequencies(rotary_width, base, device) / self.factor, 1.0

    def faults(self) -> list[str]:
        """A factor below one."""
        return below_one(self)
