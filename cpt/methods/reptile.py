"""Reptile: every few steps the weights are pulled back towards where they were, on the sharded fp32 masters.

    anchor ---- k steps of AdamW ----> weights
    weights := anchor + step_size * (weights - anchor);   anchor := weights

Each rank interpolates the pieces that it owns; nothing is sent. With replay in the batch this is called meta-experience
replay.
Source: Abbes et al. 2025, arXiv:2508.01908; Nichol et al. 2018, arXiv:1803.02999.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cpt.methods import Seams
from cpt.parallel.weights import Masters
from cpt.progress import Progress


@dataclass(frozen=True)
class Settings:
    """`every`: updates in a window. `step_size`: share of a window's displacement that is kept; 1 changes nothing.

    The paper's 0.1 all but stops learning when it is really applied to the masters: begin with 0.5 and more.
    """

    every: int = 500
    step_size: float = 0.7

    def faults(self) -> list[str]:
        """Values that are no interpolation."""
        faults = [] if self.every >= 1 else [f"every = {self.every}: at least 1 update in a window"]
        if not 0 < self.step_size <= 1:
            faults.append(f"step_size = {self.step_size}: above 0 (keep nothing) and at most 1 (keep all)")
        return faults


class Method(Seams):
    """The outer step; counts updates that were made, so a skipped one does not shorten a window."""

    num_copies = 1  # the anchor

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._anchor: list[torch.Tensor] | None = None  # one for each of the masters' pieces
        self._updates_since = 0
        self._displacement: float | None = None

    @torch.no_grad()
    def before_update(self, masters: Masters, progress: Progress) -> None:
        """The first anchor is where the first update starts."""
        self._displacement = None
        if self._anchor is None:
            self._anchor = [piece.values.clone() for piece in masters.pieces]

    @torch.no_grad()
    def after_update(self, masters: Masters, progress: Progress) -> bool:
        """Interpolate once in `every` updates."""
        self._updates_since += 1
        if self._updates_since < self.settings.every:
            return False
        self._updates_since = 0
        squares = []
        for piece, anchor in zip(masters.pieces, self._anchor, strict=True):
            squares.append(float((piece.values - anchor).square().sum(dtype=torch.float64)))
            if self.settings.step_size < 1:  # lerp with weight 1 need not be the identity in floating point
                piece.values.copy_(torch.lerp(anchor, piece.values, self.settings.step_size))
            anchor.copy_(piece.values)
        self._displacement = masters.total(squares) ** 0.5
        return self.settings.step_size < 1

    def report(self) -> dict[str, float]:
        """Length of the window's displacement before it was cut short, on the steps that end a window."""
        return {} if self._displacement is None else {"method/reptile/displacement": self._displacement}

    def state_dict(self) -> dict[str, Any]:
        """The anchor by piece, and how far the window has come."""
        return {} if self._anchor is None else {"anchor": self._anchor, "updates_since": self._updates_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back anchor and count."""
        self._anchor, self._updates_since = state["anchor"], int(state["updates_since"])
