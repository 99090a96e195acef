"""Score a model on held-out corpora: the same windows every time, divided over the ranks, summed exactly.

Losses are summed document by document, for the interval around their mean. A document that goes on in the next window
is one if both windows are scored; cut by a window that is not, it counts by its parts. Where no document begins in any
of the windows, because the files do not tell documents apart or all are longer, windows stand for documents.

Letters: B windows, S sequence length, W windows in all, G documents or parts of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cpt.config import Fault
from cpt.data.check import refuse_strange_ids
from cpt.data.corpus import Corpus
from cpt.evaluation.interval import half_width
from cpt.parallel.mesh import Mesh
from cpt.parallel.verdict import EVALUATING, FIRST_EVALUATION


@dataclass(frozen=True)
class End:
    """The end of a corpus, this share of it, which a source of an ancestor held out."""

    corpus: Path
    share: Fraction

    def faults(self) -> list[str]:
        """Nothing, or all of it."""
        return [] if 0 < self.share < 1 else [f"share = {float(self.share)}: above 0 and below 1"]


@dataclass(frozen=True)
class Settings:
    """`held_out`: name and corpus of each source to score. `windows`: of each, evenly spread; 0 for all of them.

    Scored before the first step and at the end of every stage, and every `every_tokens` in between. `inherit`: a child
    scores all that its parent does too, under the same names; what it names itself stays as it says. `ends` is filled
    so with what the sources of ancestors held out.
    """

    held_out: dict[str, Path] = field(default_factory=dict)
    inherit: bool = True
    ends: dict[str, End] = field(default_factory=dict)
    windows: int = 64
    every_tokens: int | None = None
    micro_batch: int = 16

    def faults(self) -> list[str]:
        """Counts that are too small."""
        faults = [] if self.windows >= 0 else [f"windows = {self.windows}: at least 1, or 0 for all"]
        if self.every_tokens is not None and self.every_tokens < 1:
            faults.append(f"every_tokens = {self.every_tokens}: at least 1; leave it out to score at stage ends only")
        return faults + ([] if self.micro_batch >= 1 else [f"micro_batch = {self.micro_batch}: at least 1"])


_LOOKED_UP_AT_ONCE = 1024  # windows


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token; `bits_per_byte` is None if the corpus does not know its bytes.

    `interval`: half the width of the 95 % interval around `loss`; None over fewer than two documents. `interval_over`:
    how many documents, parts of them or windows it was made of.
    """

    loss: float
    bits_per_byte: float | None
    num_tokens: int
    interval: float | None
    interval_over: str  # "113 documents"


class HeldOut:
    """Held-out text and the windows of it that are scored: a corpus, or its tokens from `first_token` to `stop_token`.

    `within_documents`: no token is foretold from another document, and so the first of each is no target. Raises Fault
    if there is no whole window, ValueError for tokens outside the corpus.
    """

    def __init__(
        self,
        path: Path,
        sequence_length: int,
        num_windows: int,
        within_documents: bool = False,
        first_token: int = 0,
        stop_token: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.corpus = Corpus.open(path)
        stop_token = self.corpus.num_tokens if stop_token is None else stop_token
        if not 0 <= first_token <= stop_token <= self.corpus.num_tokens:
            raise ValueError(
                f"tokens {first_token}..{stop_token} are not within the {self.corpus.num_tokens} of {path}"
            )
        there = (stop_token - first_token - 1) // sequence_length
        if there < 1:
            raise Fault(
                f"{path} holds {stop_token - first_token} tokens, not one window of {sequence_length + 1}; "
                "hold out more text"
            )
        number = min(there, num_windows) if num_windows else there
        self._ids = np.arange(number, dtype=np.int64) * there // number
        self._sequence_length = sequence_length
        self._within_documents = within_documents
        self._first_token = first_token
        self._phase = FIRST_EVALUATION  # in which things are compiled
        if vocabulary is not None and self.corpus.vocabulary_size is None:
            places = first_token + self._ids * sequence_length
            refuse_strange_ids(self.corpus, places, self.first_windows(number).numpy(), vocabulary)

    def score(self, token_losses: Callable[..., torch.Tensor], mesh: Mesh, micro_batch: int) -> Score:
        """The mean over all targets of its windows that count. All ranks call it.

        `token_losses` maps tokens [B, S + 1] to losses [B, S] on the CPU, 0 for targets that do not count; within
        documents it is also given, bool [B, S + 1], which tokens begin one. Raises Fault if no target counts.
        """
        first_clusters, is_over_documents = self._clusters
        sums = torch.zeros(2, int(first_clusters[-1]), dtype=torch.float64)  # of each document: losses, targets
        # Every rank makes the same number of forward passes, because under ZeRO-3 each pass gathers weights from all.
        a_turn = micro_batch * mesh.data_size
        for first in range(0, len(self._ids), a_turn):
            turn = self._ids[first : first + a_turn]
            mine = turn[mesh.data_rank :: mesh.data_size]
            asked = mine if len(mine) else turn[:1]
            mesh.watch.alive(self._phase)
            tokens = torch.from_numpy(self.corpus.windows(asked, self._sequence_length, self._first_token))
            starts = self._starts(asked)
            losses = token_losses(tokens, starts) if self._within_documents else token_losses(tokens)
            if len(mine):
                places = first_clusters[first + mesh.data_rank : first + len(turn) : mesh.data_size, None]
                clusters = (places + starts[:, 1:].cumsum(dim=1) if is_over_documents else places).expand(losses.shape)
                counts = ~starts[:, 1:] if self._within_documents else torch.ones_like(losses)
                for row, values in zip(sums, (losses, counts), strict=True):
                    row.index_add_(0, clusters.flatten(), values.flatten().double())
        sums = mesh.sum_over_data(sums.to(mesh.device)).cpu()
        self._phase = EVALUATING
        total, num_tokens = sums.sum(dim=1).tolist()
        if not num_tokens:
            raise Fault(
                f"{self.corpus.path}: every target in its windows begins a document, so that none can be scored; "
                "hold out longer documents, or score with attention across_documents"
            )
        loss = total / num_tokens
        over = f"{int((sums[1] > 0).sum())} {'documents' if is_over_documents else 'windows'}"
        return Score(loss, bits_per_byte(loss, self.corpus), int(num_tokens), half_width(*sums), over)

    def first_windows(self, number: int) -> torch.Tensor:
        """The first of its windows, up to that many: tokens [B, S + 1]."""
        return torch.from_numpy(self.corpus.windows(self._ids[:number], self._sequence_length, self._first_token))

    @cached_property
    def _clusters(self) -> tuple[torch.Tensor, bool]:
        """The number of the document that the first target of each window is of, and last how many there are, int64
        [W + 1]; whether they are documents, or windows. The same on every rank.
        """
        begun = [
            self._starts(self._ids[first : first + _LOOKED_UP_AT_ONCE])[:, 1:].sum(dim=1)
            for first in range(0, len(self._ids), _LOOKED_UP_AT_ONCE)
        ]
        num_begun = torch.cat(begun)  # in each window
        if not num_begun.any():
            return torch.arange(len(self._ids) + 1), False
        goes_on = torch.from_numpy(np.diff(self._ids, append=-1) == 1)  # in the next of the windows
        return torch.nn.functional.pad((num_begun + ~goes_on).cumsum(dim=0), (1, 0)), True

    def _starts(self, ids: np.ndarray) -> torch.Tensor:
        """Which tokens of these windows begin a document, bool [B, S + 1]."""
        first_tokens = self._first_token + ids * self._sequence_length
        return torch.from_numpy(self.corpus.document_starts(first_tokens, self._sequence_length + 1))


def bits_per_byte(loss: float, corpus: Corpus) -> float | None:
    """A loss in nats a token as bits a byte of the text, at the corpus's mean bytes a token.

    Comparable over tokenizers, which losses are not. Where the first token of each document is not scored, it is taken
    to cost as much as the others do on average: one token a document, seldom one in two hundred.
    """
    if not corpus.num_bytes:
        return None
    return loss / math.log(2) * corpus.num_text_tokens / corpus.num_bytes
