"""From slots to tokens: this rank's windows of a step, read out of the mapped shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cpt.data.order import StageOrder, Windows


@dataclass(frozen=True)
class Batch:
    """A step's windows: `tokens` [B, S + 1] and `sources` [B] of this rank; `windows` of the whole step, all ranks."""

    tokens: torch.Tensor
    sources: torch.Tensor
    windows: Windows


class Loader:
    """Reads the windows of one data rank out of `num_ranks`; every rank knows the whole step's order."""

    def __init__(self, order: StageOrder, rank: int, num_ranks: int) -> None:
        self._order, self._rank, self._num_ranks = order, rank, num_ranks

    def batch(self, first_slot: int, num_slots: int) -> Batch:
        """The batch of the step that trains on `num_slots` slots from `first_slot` on."""
        windows = self._order.windows(first_slot, num_slots)
        here = num_slots // self._num_ranks
        mine = slice(self._rank * here, (self._rank + 1) * here)
        tokens = read_windows(self._order, windows.stream[mine], windows.first_token[mine])
        return Batch(torch.from_numpy(tokens), torch.from_numpy(windows.stream[mine]), windows)


def read_windows(order: StageOrder, stream: np.ndarray, first_token: np.ndarray) -> np.ndarray:
    """The tokens [B, S + 1] int64 of the windows that begin at `first_token` [B] of the sources `stream` [B]."""
    length = order.sequence_length
    window, offset = np.divmod(first_token, length)
    tokens = np.empty((len(stream), length + 1), dtype=np.int64)
    # Windows of one corpus and one epoch lie on one grid; each grid is read at once.
    for index, start in np.unique(np.stack([stream, offset]), axis=1).T.tolist():
        at = np.flatnonzero((stream == index) & (offset == start))
        tokens[at] = order.corpora[index].windows(window[at], length, start)
    return tokens
