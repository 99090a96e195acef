"""A pull towards the weights as they were when the stage began, on the sharded fp32 masters.

    weights := weights - learning_rate * strength * (weights - start)      before AdamW's update, like its weight decay

Each rank pulls the pieces that it owns; nothing is sent but one number a step, for the log.
Source: Li et al. 2018, arXiv:1802.01483 (L2-SP), decoupled from AdamW's moments as in arXiv:1711.05101.
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
    """`strength`: beside AdamW's weight decay, which pulls towards 0; 0 changes nothing."""

    strength: float = 0.1

    def faults(self) -> list[str]:
        """A push."""
        return [] if self.strength >= 0 else [f"strength = {self.strength}: at least 0"]


class Method(Seams):
    """Keeps the start of the stage; a new stage has a new one."""

    num_copies = 1  # the start

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._start: list[torch.Tensor] | None = None  # one for each of the masters' pieces
        self._distance = 0.0

    @torch.no_grad()
    def before_update(self, masters: Masters, progress: Progress) -> None:
        """Pull, as hard as the learning rate of this step says."""
        if self._start is None:
            self._start = [piece.values.clone() for piece in masters.pieces]
        squares, pull = [], masters.learning_rate * self.settings.strength
        for piece, start in zip(masters.pieces, self._start, strict=True):
            way = piece.values - start
            squares.append(float(way.square().sum(dtype=torch.float64)))
            if pull:  # 0 times an infinity would be a number that is none
                piece.values.sub_(way, alpha=pull)
        self._distance = masters.total(squares) ** 0.5

    def end_stage(self, masters: Masters, progress: Progress) -> bool:
        """The next stage's start is where its first update starts."""
        self._start = None
        return False

    def report(self) -> dict[str, float]:
        """How far the weights were from the start before this step's update."""
        return {"method/l2_to_start/distance": self._distance}

    def state_dict(self) -> dict[str, Any]:
        """The start by piece."""
        return {} if self._start is None else {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the start."""
        self._start = state.get("start")
