"""Long texts in parts, so that encoding one takes little memory: engines need up to 300 bytes a character.

Where a text may be cut is not known beforehand for any tokenizer, so it is tried: around a place between two words or
before a line end, the ids of both sides must be those of the whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np

LONGEST_AT_ONCE = 2**22
# Ids do not depend on characters farther away than this: words, runs of white space and merges end sooner.
CONTEXT = 2_000
SEARCHED = 2**16
PLACES_TRIED = 16
_BETWEEN_WORDS = re.compile(r"(?<=\w)\n|(?<=\w) (?=\w)")


def parts_of(text: str, encode: Callable[[str], np.ndarray]) -> Iterator[str]:
    """The text in parts of at most about LONGEST_AT_ONCE characters whose ids, joined, are those of the whole.

    A part is longer where no place for a cut is found.
    """
    start = 0
    while len(text) - start > LONGEST_AT_ONCE:
        cut = _find_cut(text, start, start + LONGEST_AT_ONCE, encode)
        if cut is None:
            break
        yield text[start : cut[0]]
        start = cut[1]
    yield text[start:]


def _find_cut(text: str, start: int, stop: int, encode: Callable[[str], np.ndarray]) -> tuple[int, int] | None:
    """The end of one part and the beginning of the next, near `stop`; None if there is no good place."""
    first = max(start + CONTEXT, stop - SEARCHED)
    places = [match.start() for match in _BETWEEN_WORDS.finditer(text, first, stop)]
    for place in itertools.islice(reversed(places), PLACES_TRIED):
        before, after = text[max(start, place - CONTEXT) : place], text[place : place + CONTEXT]
        whole, left = encode(before + after), encode(before)
        # A tokenizer that puts a space before every text makes up for the one that is left out.
        for dropped in (0, 1):
            if np.array_equal(whole, np.concatenate([left, encode(after[dropped:])])):
                return place, place + dropped
    return None
