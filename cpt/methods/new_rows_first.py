"""For the first tokens of a run only the rows of new vocabulary learn: the others wait until the new ones make sense.

    before the first update    remember masters and moments of everything but the new rows
    after every update         put them back: no gradient, no weight decay and no moment has any effect on them
    after the last of them     AdamW's count of updates is what it was at the beginning

Each rank puts back the pieces that it owns; nothing is sent. The count goes back because one count serves all
parameters: without that the others' first moments would be taken for those of a long run, and their first steps be of
the wrong length. Where it goes back to 0 the new rows' moments do so too; where moments were warm, new rows keep
theirs, which are warm as well. Gradients are clipped by the norm of all, waiting ones included; AdamW hardly notices a
common factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cpt.methods import Seams
from cpt.parallel.weights import MOMENTS, Masters, Piece
from cpt.progress import Progress

# Matrices with a row for each token of the vocabulary, by our models' names.
VOCABULARY_MATRICES = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Settings:
    """`tokens` of the run for which only rows from `first_row` on learn; 0 changes nothing."""

    tokens: int = 0
    first_row: int = 0

    def faults(self) -> list[str]:
        """Counts below nothing."""
        told = {"tokens": self.tokens, "first_row": self.first_row}
        return [f"{name} = {value}: at least 0" for name, value in told.items() if value < 0]


@dataclass(frozen=True)
class _Waiting:
    """What a piece holds before the rows that learn; a moment that is 0 throughout is None."""

    values: torch.Tensor
    moments: dict[str, torch.Tensor | None]


class Method(Seams):
    """Holds still what is not new; a stop in between goes on the same, as what waits is in the checkpoint unchanged."""

    num_copies = 1  # of the masters; moments are copied only where they do not begin at 0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._waiting: list[_Waiting] | None = None  # one for each of the masters' pieces
        self._updates_before: int | None = None  # while something waits

    @torch.no_grad()
    def before_update(self, masters: Masters, progress: Progress) -> None:
        """Remember what waits, or let it go."""
        if progress.tokens < self.settings.tokens:
            if self._updates_before is None:
                self._updates_before = masters.num_updates
            if self._waiting is None:
                self._waiting = [self._remembered(piece) for piece in masters.pieces]
        elif self._updates_before is not None:
            self._begin_again(masters)

    @torch.no_grad()
    def after_update(self, masters: Masters, progress: Progress) -> bool:
        """Put back what waits."""
        if self._waiting is None:
            return False
        for piece, waiting in zip(masters.pieces, self._waiting, strict=True):
            number = len(waiting.values)
            piece.values[:number].copy_(waiting.values)
            for moment, values in waiting.moments.items():
                into = piece.moments[moment][:number]
                into.zero_() if values is None else into.copy_(values)
        return True

    def state_dict(self) -> dict[str, Any]:
        """While something waits, the count of updates to go back to."""
        return {} if self._updates_before is None else {"updates_before": self._updates_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the count."""
        before = state.get("updates_before")
        self._updates_before, self._waiting = None if before is None else int(before), None

    def _remembered(self, piece: Piece) -> _Waiting:
        number = self._num_waiting(piece)
        moments = {name: piece.moments[name][:number] for name in MOMENTS}
        kept = {name: values.clone() if bool(values.any()) else None for name, values in moments.items()}
        return _Waiting(piece.values[:number].clone(), kept)

    def _num_waiting(self, piece: Piece) -> int:
        """How many of the piece's elements come before the rows that learn."""
        if piece.name not in VOCABULARY_MATRICES:
            return len(piece.values)
        first_element = self.settings.first_row * piece.shape[1]
        return min(max(first_element - piece.start, 0), len(piece.values))

    def _begin_again(self, masters: Masters) -> None:
        if self._updates_before == 0:
            for piece in masters.pieces:
                for moment in MOMENTS:
                    piece.moments[moment][self._num_waiting(piece) :].zero_()
        masters.num_updates = self._updates_before
        self._waiting = self._updates_before = None
