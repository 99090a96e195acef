"""YaRN: as llama3 does, with a ramp over the pairs' numbers, and attention a little sharper."""

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
    """Pairs that turn `fast_turns` times in `original_length` positions stay, those of `slow_turns` are slowed down.

    `amplitude`: what cosines and sines are multiplied with; left out, 1 + ln(factor) / 10. `rounded`: the ramp begins
    and ends at whole pairs, as transformers' `truncate` says.
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    amplitude: float | None = None
    rounded: bool = True

    @property
    def amplitude_used(self) -> float:
        """The amplitude as told, or as the paper derives it."""
        return 1 + 0.1 * math.log(self.factor) if self.amplitude is None else self.amplitude

    def scaled(self, rotary_width: int, base: float, num_positions: int, device: torch.device) -> tuple[Tensor, float]:
        """Frequencies between f / factor and f, and the amplitude. Source: Peng et al. 2023, arXiv:2309.00071."""
        plain = rotary.frequencies(rotary_width, base, device)
        first = self._pair_that_turns(self.fast_turns, rotary_width, base)
        last = self._pair_that_turns(self.slow_turns, rotary_width, base)
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        # As published: bounded by the width although there are only half as many pairs.
        first, last = max(first, 0), min(last, rotary_width - 1)
        pairs = torch.arange(rotary_width // 2, dtype=torch.float32, device=device)
        share_slowed = ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
        return share_slowed * plain / self.factor + (1 - share_slowed) * plain, self.amplitude_used

    def _pair_that_turns(self, turns: float, rotary_width: int, base: float) -> float:
        """Number of the pair, not whole, that turns so many times within the original length."""
        return rotary_width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def faults(self) -> list[str]:
        """A factor below one, a length of nothing, slow above fast, no amplitude."""
        lines = below_one(self) + not_positive(self, ("original_length", "slow_turns", "amplitude"))
        if self.fast_turns < self.slow_turns:
            lines.append(f"fast_turns = {self.fast_turns}: must not be less than slow_turns = {self.slow_turns}")
        return lines
