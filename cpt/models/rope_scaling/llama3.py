"""Llama 3.1's: slow pairs are slowed down by the factor, fast ones stay, those between are blended."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt.models.layers.shape import not_positive
from cpt.models.rope_scaling import below_one
from cpt_kernels import rotary


@dataclass(frozen=True)
class Settings:
    """A pair is slow if it turns fewer than `low_frequency_factor` times in `original_length` positions.

    It is fast if it turns more than `high_frequency_factor` times.
    """

    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def scaled(self, rotary_width: int, base: float, num_positions: int, device: torch.device) -> tuple[Tensor, float]:
        """Frequencies between f / factor and f. Source: Dubey et al. 2024, arXiv:2407.21783, and the released code."""
        plain = rotary.frequencies(rotary_width, base, device)
        turns = self.original_length * plain / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        share_kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share_kept) * plain / self.factor + share_kept * plain, 1.0

    def faults(self) -> list[str]:
        """A factor below one, a length of nothing, slow above fast."""
        lines = below_one(self) + not_positive(self, ("original_length", "low_frequency_factor"))
        if self.high_frequency_factor <= self.low_frequency_factor:
            lines.append(
                f"high_frequency_factor = {self.high_frequency_factor}: must be more than"
                f" low_frequency_factor = {self.low_frequency_factor}"
            )
        return lines
