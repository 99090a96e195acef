"""Texts to ids by a fast engine for as long as it agrees with the tokenizers library, which serves from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import tokenizers

from cpt.data.prepare.fast_bpe import FastBpe, NotServed

logger = logging.getLogger(__name__)

# Of what a process encodes first, and of every input file.
VERIFIED_CHARACTERS = 200_000
VERIFIED_OF_EACH_INPUT = 10_000
NAME_OF_FAST, NAME_OF_REFERENCE = "tiktoken", "tokenizers"


class Engine(Protocol):
    """What `CheckedEncoder` holds against the tokenizers library."""

    def encode(self, text: str) -> np.ndarray | None:
        """Token ids of the text, int32 [tokens]; None for a text that the tokenizers library must serve."""


class CheckedEncoder:
    """Encodes with the fast engine for as long as it agrees with `reference`, which serves from then on.

    The first VERIFIED_CHARACTERS are encoded by both and get the reference's ids, so a wrong engine is noticed before
    any of its ids is used; so are the first VERIFIED_OF_EACH_INPUT of every input.

    description: which package tokenizes at first, and why, for the log.
    """

    def __init__(
        self, reference: tokenizers.Tokenizer, build_engine: Callable[[tokenizers.Tokenizer], Engine] = FastBpe
    ) -> None:
        self._reference = reference
        self._num_to_verify = VERIFIED_CHARACTERS
        self._fast: Engine | None = None
        self.description = f"the package {NAME_OF_REFERENCE}"
        try:
            self._fast = build_engine(reference)
        except NotServed as reason:
            self.description += f"; {NAME_OF_FAST} is faster, but {reason}"
            return
        # The same in every process, so that they all choose the same engine.
        self._verified(text_of_traps(token.content for token in reference.get_added_tokens_decoder().values()))
        self._num_to_verify = VERIFIED_CHARACTERS
        if self._fast:
            self.description = (
                f"the package {NAME_OF_FAST}, held against {NAME_OF_REFERENCE} on the first {VERIFIED_CHARACTERS:,} "
                f"characters and on {VERIFIED_OF_EACH_INPUT:,} of every input file"
            )

    @property
    def engine(self) -> str:
        """The package that tokenizes."""
        return NAME_OF_FAST if self._fast else NAME_OF_REFERENCE

    def begin_input(self) -> None:
        """The texts to come are of another input."""
        self._num_to_verify = max(self._num_to_verify, VERIFIED_OF_EACH_INPUT)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, int32 [tokens]."""
        if self._fast and self._num_to_verify > 0:
            # Of a long text only the beginning: the library would take a hundred times its length of memory.
            sample = text[: self._num_to_verify]
            expected = self._verified(sample)
            if len(sample) == len(text):
                return expected
        ids = self._fast.encode(text) if self._fast else None
        return self._ids_of_reference(text) if ids is None else ids

    def _ids_of_reference(self, text: str) -> np.ndarray:
        return np.array(self._reference.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _verified(self, text: str) -> np.ndarray:
        encoding = self._reference.encode(text, add_special_tokens=False)
        expected = np.array(encoding.ids, dtype=np.int32)
        ids = self._fast.encode(text)
        if ids is None:
            return expected
        self._num_to_verify -= len(text)
        if not np.array_equal(ids, expected):
            position = _first_difference(ids, encoding)
            logger.warning(
                "%s gives other ids than %s at character %d of the text %r; %s serves from here on",
                NAME_OF_FAST,
                NAME_OF_REFERENCE,
                position,
                text[max(0, position - 20) : position + 20],
                NAME_OF_REFERENCE,
            )
            self._fast = None
        return expected


def _first_difference(ids: np.ndarray, encoding: tokenizers.Encoding) -> int:
    """The character at which ids leave those of the encoding."""
    shorter = min(ids.size, len(encoding.ids))
    differing = np.flatnonzero(ids[:shorter] != np.array(encoding.ids[:shorter]))
    index = int(differing[0]) if differing.size else shorter
    if index < len(encoding.ids):
        return encoding.offsets[index][0]
    return encoding.offsets[-1][1] if encoding.ids else 0


def text_of_traps(added_tokens: Iterable[str]) -> str:
    """A few kilobytes of what engines are known to differ in: runs of white space, contractions, added tokens."""
    runs = [character * length for character in (" ", "\t", "\n", "\r\n", " \n", "-", "=") for length in range(1, 41)]
    words = ["I'll", "DON'T", "x'", "12345", "a1b2", "e\u0301t", "übung", "東京", "\u200b", "👩\u200d💻", "\0", "."]
    added = list(added_tokens)[:64]
    return "".join(run + words[number % len(words)] for number, run in enumerate(runs)) + "x".join(added) + "  \n "
