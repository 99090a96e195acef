"""BPE continued: what to merge next in texts that a tokenizer has cut into its tokens already.

    ids --[bytes of unknown characters put together]--> units --[cut at the ends of words]--> words of stand-ins
        --[BPE trainer of the package tokenizers]--> merges of stand-ins --[spelled out]--> pieces and merges

A unit is an old token, or a character that the old vocabulary spells in bytes. In the words every unit is one
character, so the trainer begins where the old tokenizer ends and finds merges whose ranks come after all old ones.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from cpt.data.prepare.pieces import Vocabulary

WORD_END = "\n"
SMALLEST_COUNT = 2
# Rare characters stay spelled in bytes: as SentencePiece does, all but this share of a text gets pieces.
UNCOVERED_SHARE = 0.0005
# Of pieces in characters, as in SentencePiece. Pieces in bytes end where the pre-tokenizer's words do.
LONGEST_PIECE = 16
# Stand-ins are valid characters that are no line end: beyond Latin-1 and around the surrogates.
_FIRST_STAND_IN, _SURROGATES, _NUM_SURROGATES = 0x100, 0xD800, 0x800
_LETTER, _DIGIT, _SPACE, _ONE_SPACE, _LINE_END, _OTHER = range(6)


@dataclass(frozen=True)
class Learned:
    """New pieces in the order of their ids, and the merges that make those of more than one unit."""

    pieces: list[str]
    merges: list[tuple[str, str]]


class CutTexts:
    """Texts cut into old tokens; `learn` finds out what to merge next."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pieces: list[str] = [piece or "" for piece in vocabulary.pieces]
        self._unit_of: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._num_characters = 0
        self._texts: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._byte_of = np.full(vocabulary.size, -1, dtype=np.int16)
        self._byte_of[list(vocabulary.bytes_of)] = list(vocabulary.bytes_of.values())

    def add(self, text: str, ids: np.ndarray, words: np.ndarray | None) -> None:
        """Adds a text with its old ids; `words` numbers the pre-tokenizer's word of each, where it makes words."""
        self._num_characters += len(text)
        if self._vocabulary.is_byte_level:
            self._texts.append((ids, None if words is None else words[1:] != words[:-1]))
        else:
            self._texts.append((self._units(ids), None))

    def learn(self, num_new: int) -> Learned:
        """Up to `num_new` pieces, the most useful first; fewer if the texts yield no more."""
        frequent = self._frequent_characters()
        # Characters at most half of it, or of a script of thousands there would be nothing but characters.
        learned = self._learn(frequent[: num_new // 2], num_new)
        if len(learned.pieces) < num_new and len(frequent) > num_new // 2:
            learned = self._learn(frequent[:num_new], num_new)
        return learned

    def _learn(self, characters: list[str], num_new: int) -> Learned:
        words = self._words(characters)
        num_units = len(set().union(*words) - {WORD_END})
        num_merged = num_new - len(characters)
        num_asked = num_merged
        while num_merged:
            merges, is_all = _trained_merges(words, num_units, num_asked)
            learned = self._spelled(merges, characters, num_new)
            if is_all or len(learned.pieces) == num_new:
                return learned
            # Some merges lead to pieces that are there already or must not be.
            num_asked += 2 * (num_new - len(learned.pieces))
        return Learned(characters, [])

    def _units(self, ids: np.ndarray) -> np.ndarray:
        """The ids, with the tokens of a character's bytes replaced by the unit of the character."""
        values = self._byte_of[ids]
        if (values < 0).all():
            return ids
        units: list[int] = []
        for is_byte, group in itertools.groupby(zip(ids.tolist(), values.tolist(), strict=True), lambda x: x[1] >= 0):
            if not is_byte:
                units.extend(token_id for token_id, _ in group)
                continue
            characters = bytes(value for _, value in group).decode(errors="replace")
            self._counts.update(characters)
            units.extend(map(self._unit, characters))
        return np.array(units, dtype=np.int32)

    def _unit(self, character: str) -> int:
        if character not in self._unit_of:
            self._unit_of[character] = len(self._pieces)
            self._pieces.append(character)
        return self._unit_of[character]

    def _frequent_characters(self) -> list[str]:
        """Characters worth a piece of their own, the most frequent first."""
        # One of one byte, such as a line end, is a token already.
        counts = {character: count for character, count in self._counts.items() if ord(character) >= 0x80}
        uncovered, chosen = sum(counts.values()), []
        for character, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
            if count < SMALLEST_COUNT or uncovered <= UNCOVERED_SHARE * self._num_characters:
                break
            chosen.append(character)
            uncovered -= count
        return chosen

    def _words(self, characters: list[str]) -> list[str]:
        """Every text as stand-ins of its units, with WORD_END where no merge may cross."""
        numbers = np.arange(len(self._pieces), dtype=np.uint32) + _FIRST_STAND_IN
        codes = numbers + np.where(numbers >= _SURROGATES, _NUM_SURROGATES, 0).astype(np.uint32)
        left_out = [self._unit_of[character] for character in self._unit_of.keys() - set(characters)]
        codes[[*self._vocabulary.added, *left_out]] = ord(WORD_END)
        is_end = None if self._vocabulary.is_byte_level else self._ends_of_words()
        words = []
        for units, breaks in self._texts:
            if is_end is not None:
                breaks = is_end(units)
            text = codes[units]
            if breaks is not None:
                text = np.insert(text, np.flatnonzero(breaks) + 1, ord(WORD_END))
            words.append(text.astype("<u4").tobytes().decode("utf-32-le"))
        return words

    def _ends_of_words(self) -> Callable[[np.ndarray], np.ndarray]:
        """For pieces in characters: tells after which units of a text, but for the last, a word ends.

        SentencePiece has no pre-tokenizer but learns within words only; so a space begins a word, and letters, digits
        and other signs do not mix. Digits stand alone where no old piece has two.
        """
        first = np.array([_kind(piece[:1]) for piece in self._pieces])
        last = np.array([_ONE_SPACE if piece == "\u2581" else _kind(piece[-1:]) for piece in self._pieces])
        ends = np.ones((6, 6), dtype=bool)
        for before, after in (
            *((kind, kind) for kind in (_LETTER, _SPACE, _LINE_END, _OTHER)),
            *((_ONE_SPACE, kind) for kind in (_LETTER, _SPACE, _OTHER)),
            (_OTHER, _LINE_END),
        ):
            ends[before, after] = False
        ends[_DIGIT, _DIGIT] = not any(sum(map(str.isdigit, piece)) > 1 for piece in self._merged_pieces())
        return lambda units: ends[last[units[:-1]], first[units[1:]]]

    def _merged_pieces(self) -> Iterator[str]:
        fixed = self._vocabulary.added.keys() | self._vocabulary.bytes_of.keys()
        return (piece for token_id, piece in enumerate(self._pieces) if token_id not in fixed)

    def _spelled(self, merges: list[tuple[str, str]], characters: list[str], num_new: int) -> Learned:
        """The merges of stand-ins as merges of pieces, and the pieces that they add."""
        vocabulary = self._vocabulary
        known = {*filter(None, vocabulary.pieces), *characters}
        forbidden = {*vocabulary.added.values(), *map(vocabulary.written, vocabulary.added.values())}
        longest = None if vocabulary.is_byte_level else LONGEST_PIECE
        pieces, rules = list(characters), []
        unusable: set[str] = set()
        for left, right in merges:
            pair = self._text_of(left), self._text_of(right)
            piece = "".join(pair)
            # A line of merges.txt style is two pieces with a space between.
            is_bad = piece in forbidden or " " in piece or (longest is not None and len(piece) > longest)
            if is_bad or left in unusable or right in unusable:
                unusable.add(left + right)
                continue
            rules.append(pair)
            if piece not in known:
                known.add(piece)
                pieces.append(piece)
                if len(pieces) == num_new:
                    break
        return Learned(pieces, list(dict.fromkeys(rules)))

    def _text_of(self, stand_ins: str) -> str:
        codes = map(ord, stand_ins)
        numbers = (code - _NUM_SURROGATES if code >= _SURROGATES else code for code in codes)
        return "".join(self._pieces[number - _FIRST_STAND_IN] for number in numbers)


def _kind(character: str) -> int:
    if character in ("", "\n", "\r", "\t"):
        return _LINE_END
    if character in (" ", "\u2581"):
        return _SPACE
    category = unicodedata.category(character)
    if category[0] in "LM":
        return _LETTER
    return _DIGIT if category[0] == "N" else _OTHER


def _trained_merges(words: list[str], num_units: int, num_merges: int) -> tuple[list[tuple[str, str]], bool]:
    """Merges of stand-ins, the most frequent first, and whether the words yield no more."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORD_END, "removed")
    size = num_units + num_merges
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=SMALLEST_COUNT, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges], tokenizer.get_vocab_size() < size
