"""Where documents begin in a batch of windows, in the forms that attention, positions and losses ask for.

    tokens     a a a b b c | d d d d e e     two windows; a document never goes on in the next window
    starts     1 0 0 1 0 1 | 1 0 0 0 1 0
    positions  0 1 2 0 1 0 | 0 1 2 3 0 1
    cu_seqlens 0     3   5   6       10  12  over the flattened tokens, as in flash-attention's varlen functions

B windows, S positions, D documents.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpt_kernels.cross_entropy import IGNORED


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch; make it with `from_starts`.

    positions: place of each token within its document, int64 [B, S]. cu_seqlens: first token of each document and,
    last, the number of tokens, int32 [D + 1]. longest: tokens of the longest document.
    """

    positions: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def from_starts(cls, starts: Tensor) -> Documents:
        """The documents of windows in which `starts`, bool [B, S], marks the first token of each.

        The first token of a window begins a document, marked or not. The number of documents and the longest of them
        are looked up, for which a GPU is waited for twice: make it of starts on the CPU and move it there.
        """
        windows, length = starts.shape
        places = torch.arange(length, device=starts.device)
        is_start = starts | (places == 0)
        positions = places - torch.where(is_start, places, 0).cummax(dim=1).values  # [B, S]
        begins = is_start.flatten().nonzero()[:, 0]
        cu_seqlens = torch.nn.functional.pad(begins, (0, 1), value=windows * length)
        return cls(positions, cu_seqlens.to(torch.int32), int(positions.max()) + 1)

    def to(self, device: torch.device) -> Documents:
        """The same on another device, without waiting for it."""
        positions = self.positions.to(device, non_blocking=True)
        return dataclasses.replace(self, positions=positions, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))

    @property
    def are_windows(self) -> bool:
        """Whether every window is one document, so that causal attention alone does."""
        return len(self.cu_seqlens) == len(self.positions) + 1

    @cached_property
    def is_visible(self) -> Tensor:
        """Whether a query may look at a key: in its own document and not later, bool [B, 1, queries S, keys S]."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        firsts = places - self.positions  # where the document of each query begins, [B, S]
        is_same = places >= firsts[:, :, None]
        return (is_same & (places <= places[:, None]))[:, None]

    @cached_property
    def begins(self) -> Tensor:
        """Position in its window at which the document of each token begins, int32 [B, S]."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        return (places - self.positions).to(torch.int32)

    @cached_property
    def ends(self) -> Tensor:
        """Position in its window before which the document of each token ends, int32 [B, S]."""
        windows, length = self.positions.shape
        places = torch.arange(windows * length, dtype=torch.int32, device=self.positions.device)
        following = self.cu_seqlens[torch.searchsorted(self.cu_seqlens, places, right=True)]
        return (following - places // length * length).view(windows, length)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(documents, tokens of each) for each run of neighbours of one length, in order. Waits for a GPU."""
        lengths = self.cu_seqlens.diff().tolist()
        return [(len(list(alike)), length) for length, alike in itertools.groupby(lengths)]

    @cached_property
    def num_visible(self) -> int:
        """Pairs of tokens in one document: the sum of the squares of the documents' lengths. Waits for a GPU."""
        return sum(documents * length**2 for documents, length in self.runs)


def model_inputs(tokens: Tensor, starts: Tensor | None, device: torch.device) -> tuple[Tensor | Documents, ...]:
    """What a model is called with for windows `tokens` [B, S + 1]: inputs and targets [B, S] on `device`.

    With `starts` [B, S + 1], on the CPU and true where a token begins a document, `Documents` too: attention stays
    inside a document. The first token of a document cannot be told from the end of another, so as a target it is
    IGNORED. Without, attention runs across documents and every target counts.
    """
    tokens = tokens.to(device, non_blocking=True).long()
    if starts is None:
        return tokens[:, :-1], tokens[:, 1:]
    is_ignored = starts[:, 1:].to(device, non_blocking=True)
    documents = Documents.from_starts(starts[:, :-1]).to(device)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(is_ignored, IGNORED), documents


def num_counting(tokens: Tensor, starts: Tensor | None) -> Tensor:
    """How many targets of each window count, int64 [B] on the CPU, if a model is called with these `model_inputs`."""
    if starts is None:
        return torch.full((len(tokens),), tokens.shape[1] - 1)
    return (~starts[:, 1:]).sum(dim=1)
