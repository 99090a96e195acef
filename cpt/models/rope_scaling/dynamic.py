"""A base that grows with the sequence: sequences of up to the original length stay as they were trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt.models.layers.shape import not_positive
from cpt.models.rope_scaling import below_one
from cpt_kernels import rotary


@dataclass(frozen=True)
class Settings:
    """`original_length`: positions of the training before. `factor`: how fast the base grows beyond them."""

    factor: float
    original_length: int

    def scaled(self, rotary_width: int, base: float, num_positions: int, device: torch.device) -> tuple[Tensor, float]:
        """Frequencies for a sequence of `num_positions`: those of a larger base if it is longer than the original.

        As transformers computes one forward pass of a whole sequence with a new model. (Its model remembers the longest
        sequence so far, so that there a later, shorter one may meet larger bases.) Windows that hold several documents
        have the base of the window's length. Source: "dynamic NTK", as told in Peng et al. 2023, arXiv:2309.00071, B.
        """
        length = max(num_positions, self.original_length)
        growth = self.factor * length / self.original_length - (self.factor - 1)
        if rotary_width > 2:  # the only pair of a width of 2 turns by 1 whatever the base
            base = base * growth ** (rotary_width / (rotary_width - 2))
        return rotary.frequencies(rotary_width, base, device), 1.0

    def faults(self) -> list[str]:
        """A factor below one, a length of nothing."""
        return below_one(self) + not_positive(self, ("original_length",))
