"""Ways to let rotary positions reach further than a model was trained to, one file each.

A file holds frozen `Settings` with `scaled(rotary_width, base, num_positions, device)`: the frequencies in place of the
plain ones, [K/2] in fp32, and what cosines and sines are multiplied with. All compute what transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpt_kernels import rotary


def angles(scaling: Any | None, rotary_width: int, base: float, num_positions: int, device: torch.device) -> Tensor:
    """Cosines and sines for a sequence of that length, [2, S, K/2] in fp32; plain ones where `scaling` is None."""
    if scaling is None:
        return rotary.table(num_positions, rotary.frequencies(rotary_width, base, device))
    return rotary.table(num_positions, *scaling.scaled(rotary_width, base, num_positions, device))


def below_one(settings: Any) -> list[str]:
    """A line for a factor that would shorten the reach."""
    return [] if settings.factor >= 1 else [f"factor = {settings.factor}: a reach grows by at least 1"]
