"""A faster engine for byte-level BPE tokenizers: the ids of the tokenizers library, through the package tiktoken.

The road of a text:

    added tokens cut out -> NFC where asked for -> added tokens cut out -> regex and merges -> ids
    (normalized: false)                            (normalized: true)      (tiktoken)

Equality is the point, speed comes second: a tokenizer of another shape is not served at all, nor is a text with
characters that versions of Unicode disagree about.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers

OLDEST_TIKTOKEN = (0, 14)

# A look ahead makes tiktoken's regex engine walk by hand; what needs none stands in a group, which it gives to a faster
# one: 1.4 times the speed.
GPT2_PATTERN = (
    r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)"
    r"|\s+(?!\S)|\s+"
)
_LIKE_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_REST_LIKE_LLAMA_3 = r"|\s+(?!\S)|\s+"
# The regex of a pre-tokenizer as files have it, and what we make of it. Llama 3 takes digits by three, Qwen 2 by one.
PATTERNS = {
    f"{_LIKE_LLAMA_3 % numbers}{_REST_LIKE_LLAMA_3}": f"(?:{_LIKE_LLAMA_3 % numbers}){_REST_LIKE_LLAMA_3}"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
}

# tiktoken's regex engine gives up on longer runs of white space.
LONGEST_WHITE_SPACE = 100_000
_TOO_LONG_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_WHITE_SPACE}}}")

# Stands for an added token inside a text: private use, so no letter, number or space, and never composed by NFC.
FIRST_STAND_IN = 0x100000

# C0, C1 and F5 to FF are in no UTF-8; GPT-NeoX's vocabulary lacks them.
BYTES_OF_TEXT = {*range(0xC0), *range(0xC2, 0xF5)}

# Letters, numbers and marks that came after Unicode 9, which the tokenizers library normalises by.
_YOUNG = (
    "0560 0588 05EF 07FD 0860-086A 0870-088F 0897-089F 08B5 08BE-08D3 09FC-09FE 0AFA-0AFF 0B55 0C04 0C3C 0C5C-0C5D "
    "0CDC-0CDD 0CF3 0D00 0D04 0D3B-0D3C 0D81 0E86 0E89 0E8C-0E93 0E98 0EA0 0EA8-0EA9 0EAC 0EBA 0ECE 170D 1715 171F "
    "180F 1878 1ABF-1AFF 1B4C 1C89-1C8A 1C90-1CBF 1CF7 1CFA 1DF6-1DFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF "
    "9FD6-9FFF A7AF A7B8-A7F6 A82C A8FE-A8FF AB66-AB69"
)
# Beyond 16 bits only these are as old and as common: mathematical letters, emoji, ideographs of extension B.
_OLD_BEYOND_16_BITS = "1D400-1D7FF 1F000-1FAFF 20000-2A6D6"


class NotServed(Exception):
    """The fast engine cannot serve this tokenizer; the message says why, in a clause without an end."""


def refuse(reference: tokenizers.Tokenizer) -> FastBpe:
    """In the place of `FastBpe` where no fast engine is wanted: raises NotServed."""
    raise NotServed("it was not asked for")


class FastBpe:
    """Byte-level BPE through tiktoken, made from a tokenizer of the tokenizers library.

    Serves tokenizers of the GPT-2, GPT-NeoX (Pythia), Llama-3 and Qwen-2 kinds: model BPE over bytes without dropout,
    normaliser NFC or none, one of the known regexes, added tokens without stripping.

    Raises NotServed for others.
    """

    def __init__(self, reference: tokenizers.Tokenizer) -> None:
        content = json.loads(reference.to_str())
        # Before tiktoken is looked for: nobody should install it for a tokenizer that it cannot serve.
        pattern = _pattern(content["pre_tokenizer"])
        self._normalizes = _is_nfc(content["normalizer"])
        ranks, ids = _ranks(content, reference)
        self._stages, stand_ins = _stages(content["added_tokens"], reference, self._normalizes)
        try:
            import tiktoken
        except ImportError as error:
            raise NotServed("it is not installed; pip install 'cpt-trainer[fast]' adds it") from error
        # Before, the time for a word grew with the square of its length: minutes for a megabyte.
        if tuple(map(int, tiktoken.__version__.split(".")[:2])) < OLDEST_TIKTOKEN:
            raise NotServed(f"{tiktoken.__version__} is too old; pip install --upgrade 'cpt-trainer[fast]' renews it")
        # Without any special token tiktoken looks for the empty one, at every character.
        stand_ins = stand_ins or {chr(FIRST_STAND_IN): 0}
        self._stand_ins = frozenset(stand_ins)
        special_ranks = {stand_in: len(ids) + number for number, stand_in in enumerate(stand_ins)}
        self._ids = np.array([*ids, *stand_ins.values()], dtype=np.int32)
        self._encoding = tiktoken.Encoding(
            "from tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ranks
        )

    def encode(self, text: str) -> np.ndarray | None:
        """The ids that the reference would give, int32; None for a text that is left to the reference."""
        if has_doubtful_characters(text):
            return None
        if len(text) > LONGEST_WHITE_SPACE and _TOO_LONG_WHITE_SPACE.search(text):
            return None
        before, after = self._stages
        text, num_before = before(text)
        if self._normalizes and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        text, num_after = after(text)
        allowed = self._stand_ins if num_before + num_after else frozenset()
        ranks = self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        return self._ids[ranks]


def has_doubtful_characters(text: str) -> bool:
    """Whether the kind or the normal form of a character is not the same in all versions of Unicode from 9 on."""
    if text.isascii():
        return False
    # Ten times as fast as a regex.
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return bool(_is_doubtful()[codes].any())


@functools.cache
def _is_doubtful() -> np.ndarray:
    """Yes or no by code point."""
    doubtful = np.ones(0x110000, dtype=bool)
    doubtful[:0x10000] = [unicodedata.category(chr(code)) in ("Cn", "Cs") for code in range(0x10000)]
    for span, value in ((_YOUNG, True), (_OLD_BEYOND_16_BITS, False)):
        for bounds in span.split():
            first, _, last = bounds.partition("-")
            doubtful[int(first, 16) : int(last or first, 16) + 1] = value
    return doubtful


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regex that cuts a text into words, for tiktoken."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if regex in PATTERNS:
            return PATTERNS[regex]
    raise NotServed("its way to cut text into words is none of those known here")


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    if normalizer not in (None, {"type": "NFC"}):
        raise NotServed(f"its normaliser is {normalizer.get('type')}, neither NFC nor none")
    return normalizer is not None


def _ranks(content: dict[str, Any], reference: tokenizers.Tokenizer) -> tuple[dict[bytes, int], list[int]]:
    """The order in which bytes merge, as tiktoken wants it, and the token id of each rank."""
    model = content["model"]
    vocabulary, merges = model.get("vocab", {}), model.get("merges", [])
    byte_of = byte_alphabet()
    ignores_merges = model.get("ignore_merges", False)
    if model["type"] != "BPE" or model["byte_fallback"] or model["dropout"]:
        raise NotServed("its model is not plain byte-level BPE")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise NotServed("it marks the parts of words")
    tokens = [character for character in byte_of if character in vocabulary]
    num_single = len(tokens)
    if BYTES_OF_TEXT - {byte_of[character] for character in tokens}:
        raise NotServed("its vocabulary does not hold all bytes")
    for left, right in merges:
        # tiktoken knows no merges, only tokens in order: all ways to one token must follow each other.
        if left + right != tokens[-1]:
            tokens.append(left + right)
    is_repeated = len(set(tokens)) != len(tokens)
    if is_repeated or (not ignores_merges and len(tokens) != num_single + len(merges)):
        raise NotServed("some of its tokens are merged in several ways")
    if ignores_merges:
        added = {token["content"] for token in content["added_tokens"]}
        if reference.encode_special_tokens or set(vocabulary) - set(tokens) - added:
            raise NotServed("some of its tokens come from no merge")
    elif any([piece.value for piece in reference.model.tokenize(token)] != [token] for token in tokens):
        # tiktoken takes a word that is a token as that token at once.
        raise NotServed("some of its tokens do not come from their own bytes")
    try:
        ranks = {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(tokens)}
    except KeyError as error:
        raise NotServed(f"a token holds {error}, which stands for no byte") from error
    return ranks, [vocabulary[token] for token in tokens]


def byte_alphabet() -> dict[str, int]:
    """The visible character that stands for each byte in the vocabulary of a byte-level tokenizer."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


Cut = Callable[[str], tuple[str, int]]


def _stages(
    added_tokens: list[dict[str, Any]], reference: tokenizers.Tokenizer, normalizes: bool
) -> tuple[tuple[Cut, Cut], dict[str, int]]:
    """Puts one character for each added token, before NFC and after it; and the token id of each such character."""
    stages: list[dict[str, str]] = [{}, {}]
    stand_ins: dict[str, int] = {}
    for token in added_tokens:
        content = token["content"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not content:
            raise NotServed(f"its added token {content!r} strips text or must be a word")
        if token["normalized"] and normalizes and not unicodedata.is_normalized("NFC", content):
            raise NotServed(f"its added token {content!r} is not in normal form")
        if token["special"] and reference.encode_special_tokens:
            # Found all the same, so that no other token is found in its midst, but left as it is.
            stages[token["normalized"]][content] = content
            continue
        stand_in = chr(FIRST_STAND_IN + len(stand_ins))
        stages[token["normalized"]][content] = stand_in
        stand_ins[stand_in] = reference.token_to_id(content)
    before, after = (_cut(stage) for stage in stages)
    return (before, after), stand_ins


def _cut(replacements: dict[str, str]) -> Cut:
    """Replaces the leftmost, then longest, of the added tokens."""
    groups: dict[str, list[str]] = {}
    for content in sorted(replacements, key=len, reverse=True):
        groups.setdefault(content[0], []).append(content)
    # A regex for each first character is faster, as Python looks for their common beginning; but only where no token
    # can lie across another one.
    if any(first in content for first in groups for content in replacements if content[0] != first):
        groups = {"": sorted(replacements, key=len, reverse=True)}
    patterns = [re.compile("|".join(map(re.escape, group))) for group in groups.values()]

    def cut(text: str) -> tuple[str, int]:
        num_cut = 0
        for pattern in patterns:
            text, count = pattern.subn(lambda match: replacements[match[0]], text)
            num_cut += count
        return text, num_cut

    return cut
