"""Tokens back to back in one file, read through a memory map: what all kinds of shards have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np


class TokenFile(ABC):
    """Tokens, stretches and documents of one file.

    prefix: names the shard in messages. dtype: of the stored token ids. A subclass sets these and tells
    `document_starts`.
    """

    prefix: Path
    dtype: np.dtype
    num_tokens: int
    num_documents: int

    def __init__(self, prefix: Path, file: Path) -> None:
        self.prefix = prefix
        self._file = file
        self._views: dict[int, np.ndarray] = {}

    @property
    @abstractmethod
    def document_starts(self) -> np.ndarray:
        """First token of each document and, last, the number of tokens, int64 [documents + 1]."""

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.document_starts)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All token ids of the file, [num_tokens], read-only and still on the disk."""
        if self.num_tokens == 0:
            return np.empty(0, self.dtype)
        # A plain array on the map: numpy's memmap class costs a microsecond more at every slice.
        return np.asarray(np.memmap(self._file, dtype=self.dtype, mode="r"))

    def read(self, start_token: int, stop_token: int) -> np.ndarray:
        """Tokens from start to before stop, [stop - start], read-only, without a copy."""
        if not 0 <= start_token <= stop_token <= self.num_tokens:
            raise ValueError(
                f"tokens {start_token}..{stop_token} are not within the {self.num_tokens} of {self.prefix}"
            )
        return self.tokens[start_token:stop_token]

    def gather(self, start_tokens: np.ndarray, length: int) -> np.ndarray:
        """The stretches of `length` tokens that begin at start_tokens, a copy, [len(start_tokens), length].

        One fancy index over an overlapping view: half the time of a slice for each stretch.
        """
        view = self._views.get(length)
        if view is None:
            view = np.lib.stride_tricks.sliding_window_view(self.tokens, length)
            self._views = {length: view}
        return view[start_tokens]
