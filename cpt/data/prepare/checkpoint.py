"""What a build sets down to go on from: how far the inputs are read, and how far the corpora are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cpt.config import Fault
from cpt.data.prepare.document import Position


@dataclass
class Checkpoint:
    """How far a build is.

    position: the end of the last document that is in. num_documents: those that are in, also as numbers for a shuffle.
    num_bytes: their text in UTF-8. skipped: documents left out up to there, by cause. is_read: the inputs are at their
    end. corpora: as `Corpora.sync` gives them. buckets: the sizes of the buckets of a shuffle; num_merged: how many of
    them are in the corpora. is_finished: the corpora are whole, and only want renaming.
    """

    position: Position = Position()
    num_documents: int = 0
    num_bytes: int = 0
    num_without_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    is_read: bool = False
    corpora: list[dict[str, Any]] = field(default_factory=list)
    buckets: list[tuple[int, int]] = field(default_factory=list)
    num_merged: int = 0
    is_finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """The checkpoint as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Checkpoint:
        """The checkpoint that `to_json` gave; Fault for one of another release."""
        try:
            return cls(**{**content, "position": Position(*content["position"])})
        except (KeyError, TypeError) as error:
            raise Fault("the build was begun by another release and cannot go on; begin anew (--restart)") from error
