"""What all readers of input files share: the document, its position, the keys to read, and what to do about faults."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from cpt.config import Fault

logger = logging.getLogger(__name__)

READ_BUFFER_BYTES = 2**20

# Reading a document takes a few times its length of memory.
LONGEST_DOCUMENT_BYTES = 2**29
USUAL_ID_KEY = "id"


class Cause:
    """Why documents are left out, as counts name it."""

    EMPTY = "empty document"
    TOO_LONG = "document too long"
    BROKEN_JSON = "broken JSON"
    NO_TEXT = "no text under the key"
    NO_ID = "no id under the key"
    NO_DOMAIN = "no domain under the key"
    INVALID_UTF8 = "invalid UTF-8"
    NUL = "NUL character"
    DAMAGED_FILE = "damaged file"


class Position(NamedTuple):
    """A place in the inputs: the number of the file, from 0, and how many of its lines or rows come before."""

    file: int = 0
    record: int = 0


START = Position()


@dataclass(frozen=True, slots=True)
class Document:
    """A text, its id (the input's own, else where it is from), and where it is from: file and line or row.

    domain: what the input says under the key of the domain. end: the position after this document.
    """

    text: str
    id: str
    where: str
    domain: str = ""
    end: Position = START


@dataclass(frozen=True)
class Keys:
    """Keys or columns to read. An id of None is read where it has its usual name; a domain of None is not."""

    text: str
    id: str | None
    domain: str | None


@dataclass(frozen=True)
class Source:
    """One file: its name, its number among the inputs, and how many lines or rows to pass over."""

    name: str
    number: int
    start: int

    def end(self, record: int) -> Position:
        """The position right after `record`."""
        return Position(self.number, record)


class Troubles:
    """Faults in the input: raised, or counted by cause with a word about the first of each.

    longest_bytes: of a document, or of the line that holds it; what is longer is such a fault.
    """

    def __init__(self, is_skipping: bool, counts: Counter[str]) -> None:
        self._is_skipping = is_skipping
        self.counts = counts
        self.longest_bytes = LONGEST_DOCUMENT_BYTES

    def meet_too_long(self, where: str) -> None:
        """As `meet`, for a document longer than `longest_bytes`."""
        limit = f"{self.longest_bytes:,} bytes"
        self.meet(Cause.TOO_LONG, f"{where} is longer than {limit}, the most for one document", "split the document")

    def meet(self, cause: str, what: str, way_out: str, outcome: str = "it is skipped") -> None:
        """Stop at a fault with a Fault that tells `what` and `way_out`, or count it by `cause` and go on.

        The first of each cause is told, with its `outcome`.
        """
        if not self._is_skipping:
            raise Fault(f"{what}; {way_out}, or leave such input out with --on-error skip")
        if self.counts[cause] == 0:
            logger.warning("%s; %s, and others like it are counted", what, outcome)
        self.counts[cause] += 1


def is_domain(value: Any) -> bool:
    """Whether a value can name a domain: text that is not empty, or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def kind_of_value(value: Any) -> str:
    """The type of a value with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """A value as a message shows it, cut short."""
    return f"it holds {json.dumps(value)[:40]}"
