"""Score a model on held-out corpora: the same windows every time, divided over the ranks, summed exactly.

Letters: B windows, S sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.parallel.mesh import Mesh


@dataclass(frozen=True)
class Settings:
    """`held_out`: name and corpus of each source to score. `windows`: of each, evenly spread; 0 for all of them.

    Scored before the first step and at the end of every stage, and every `every_tokens` in between.
    """

    held_out: dict[str, Path] = field(default_factory=dict)
    windows: int = 64
    every_tokens: int | None = None
    micro_batch: int = 16

    def faults(self) -> list[str]:
        """Counts that are too small."""
        faults = [] if self.windows >= 0 else [f"windows = {self.windows}: at least 1, or 0 for all"]
        if self.every_tokens is not None and self.every_tokens < 1:
            faults.append(f"every_tokens = {self.every_tokens}: at least 1; leave it out to score at stage ends only")
        return faults + ([] if self.micro_batch >= 1 else [f"micro_batch = {self.micro_batch}: at least 1"])


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token; `bits_per_byte` is None if the corpus does not know its bytes."""

    loss: float
    bits_per_byte: float | None
    num_tokens: int


class HeldOut:
    """A held-out corpus and the windows of it that are scored. Raises Fault if it is shorter than one window."""

    def __init__(self, path: Path, sequence_length: int, num_windows: int) -> None:
        self.corpus = Corpus.open(path)
        there = self.corpus.num_windows(sequence_length)
        if there < 1:
            raise Fault(
                f"{path} holds {self.corpus.num_tokens} tokens, not one window of {sequence_length + 1}; "
                "hold out more text"
            )
        number = min(there, num_windows) if num_windows else there
        self._ids = np.arange(number, dtype=np.int64) * there // number
        self._sequence_length = sequence_length

    def score(self, score: Callable[[torch.Tensor], torch.Tensor], mesh: Mesh, micro_batch: int) -> Score:
        """The mean over all its windows; `score` maps tokens [B, S + 1] to summed losses [B]. All ranks call it."""
        sums = torch.zeros(2, dtype=torch.float64)
        # Every rank makes the same number of forward passes, because under ZeRO-3 each pass gathers weights from all.
        a_turn = micro_batch * mesh.data_size
        for first in range(0, len(self._ids), a_turn):
            turn = self._ids[first : first + a_turn]
            mine = turn[mesh.data_rank :: mesh.data_size]
            asked = mine if len(mine) else turn[:1]
            tokens = torch.from_numpy(self.corpus.windows(asked, self._sequence_length))
            losses = score(tokens)
            if len(mine):
                sums += torch.tensor([float(losses.sum()), losses.numel() * self._sequence_length], dtype=torch.float64)
        total, num_tokens = mesh.sum(sums.to(mesh.device)).tolist()
        loss = total / num_tokens
        return Score(loss, bits_per_byte(loss, self.corpus), int(num_tokens))


def bits_per_byte(loss: float, corpus: Corpus) -> float | None:
    """A loss in nats a token as bits a byte of the text, at the corpus's mean bytes a token.

    Comparable over tokenizers, which losses are not.
    """
    if not corpus.num_bytes:
        return None
    return loss / math.log(2) * corpus.num_tokens / corpus.num_bytes
