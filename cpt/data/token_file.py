"""Tokens back to back in one file, read through a memory map: what all kinds of shards have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np


class TokenFile(ABC):
    """Tokens, stretches and documents of one file.

    prefix: names the shard in messages. dtype: of the stored token ids. A subclass sets these and tells
    `document_starts`, all of them at once, and `starts_within`.
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
    def file(self) -> Path:
        """The file with the token ids."""
        return self._file

    @property
    @abstractmethod
    def document_starts(self) -> np.ndarray:
        """First token of each document and, last, the number of tokens, int64 [documents + 1]."""

    @abstractmethod
    def starts_within(self, first_tokens: np.ndarray, stop_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in these stretches of the file, from first to before stop, [B] each.

        Two arrays of the same length, in order: the stretch's place in B, and the token. Costs what the stretches hold,
        not what the file holds. None for a file that does not tell documents apart.
        """

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

        One fancy index over an overlapping view: half the time of a slice for each stretch. It gives up the
        interpreter's lock, whatever the length, so that a page fault on a slow disk stops this thread only; slices and
        `np.concatenate` do so from 501 tokens on.
        """
        view = self._views.get(length)
        if view is None:
            view = np.lib.stride_tricks.sliding_window_view(self.tokens, length)
            self._views = {length: view}
        return view[start_tokens]


def starts_between(
    starts_of: Callable[[np.ndarray], np.ndarray], num_documents: int, first_tokens: np.ndarray, stop_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `TokenFile.starts_within` gives, for documents whose first tokens `starts_of(numbers)` reads from an index.

    A binary search for all stretches at once. `np.searchsorted` would copy an index that is not aligned, as those of
    Megatron's files never are, whole into memory.
    """
    low, high = np.split(_documents_before(starts_of, num_documents, np.concatenate((first_tokens, stop_tokens))), 2)
    counts = high - low
    stretches = np.repeat(np.arange(len(counts)), counts)
    documents = np.arange(len(stretches)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    return stretches, starts_of(documents)


def _documents_before(
    starts_of: Callable[[np.ndarray], np.ndarray], num_documents: int, tokens: np.ndarray
) -> np.ndarray:
    """How many documents begin before each of these tokens, [len(tokens)]."""
    low, high = np.zeros(len(tokens), np.int64), np.full(len(tokens), num_documents, np.int64)
    for _ in range(num_documents.bit_length()):
        middle = (low + high) // 2
        # Where the search has ended, the last document is looked at once more, and nothing changes.
        is_before = (low < high) & (starts_of(np.minimum(middle, num_documents - 1)) < tokens)
        low, high = np.where(is_before, middle + 1, low), np.where(is_before, high, middle)
    return low
