"""The fast engine gives the ids of the tokenizers library for any text, and says which tokenizers it cannot serve."""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import re
import typing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from cpt.data.prepare import fast_bpe
from cpt.data.prepare.checked_encoder import CheckedEncoder
from cpt.data.prepare.fast_bpe import FastBpe, NotServed, has_doubtful_characters

pytest.importorskip("tiktoken")

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LLAMA_3 = next(regex for regex in fast_bpe.PATTERNS if "{1,3}" in regex)
QWEN_2 = next(regex for regex in fast_bpe.PATTERNS if "{1,3}" not in regex)
SOURCES = [inspect.getsource(module) for module in (argparse, inspect, json, re, typing)]
TEXTS = [*SOURCES, "Où est l'été ? C'est déjà là.", "----- ===== \t\t\t\n\n\n", "東京は晴れ。", "don't we'll I'VE 12"]


@cache
def make(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of the shape of a known one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("llama-3", "qwen-2"):
        split = pre_tokenizers.Split(Regex(LLAMA_3 if kind == "llama-3" else QWEN_2), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if kind in ("gpt-neox", "qwen-2"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "gpt-neox":
        tokenizer.add_tokens([AddedToken(" " * length, normalized=True) for length in range(24, 1, -1)])
    if kind == "llama-3":
        tokenizer = with_all_merges(tokenizer)
    return tokenizer


def with_all_merges(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """As transformers writes a tokenizer that came from tiktoken: every pair that makes a token is a merge."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    merges: list[list[str]] = []
    for token in sorted(vocabulary, key=vocabulary.get):
        if not token.startswith("<|"):
            pairs = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
            pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
            merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    content["model"].update(merges=merges, ignore_merges=True)
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@cache
def engine(kind: str) -> FastBpe:
    return FastBpe(make(kind))


def assert_equal(fast: FastBpe, reference: tokenizers.Tokenizer, text: str) -> None:
    assert fast.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids


KINDS = ("gpt-2", "gpt-neox", "llama-3", "qwen-2")
NASTY = st.one_of(
    st.builds(
        lambda character, length: character * length,
        st.sampled_from([" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\x85", "-", "a", "=", "0"]),
        st.integers(1, 40),
    ),
    st.sampled_from(
        ["e\u0301", "\u0301", "a\u0323\u0302", "\u1100\u1161\u11a8", "\u212b", "\u2126", "\u200d", "\ufeff", "\u2028"]
        + ["👩\u200d👩\u200d👧", "🏳️\u200d🌈", "中文字", "ひらがな", "العَرَبِيَّة", "١٢٣", "½", "𝔘", "𠀀", "\0", "\x01\x1f"]
        + ["<|endoftext|>", "<|endoftext", "|>", "<|padding|>", "12345", "Don't", "'LL", "'\u017f"]
        + ["x" * 3000, "ab" * 999]
    ),
    st.text(st.characters(max_codepoint=0x24F), max_size=8),
    st.text(max_size=4),
    st.sampled_from(SOURCES[0].split(" ")),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(pieces=st.lists(NASTY, max_size=12))
def test_nasty_texts_have_the_ids_of_the_library(kind, pieces):
    text = "".join(pieces)
    if engine(kind).encode(text) is not None:
        assert_equal(engine(kind), make(kind), text)
    assert CheckedEncoder(make(kind)).encode(text).tolist() == make(kind).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_source_code_has_the_ids_of_the_library(kind):
    for text in SOURCES:
        assert_equal(engine(kind), make(kind), text)
        assert_equal(engine(kind), make(kind), text.replace("\n", "\r\n").replace("    ", "\t"))


@pytest.mark.parametrize("kind", ["gpt-neox", "llama-3"])
def test_every_character_it_takes_is_of_the_kind_the_library_thinks(kind):
    characters = [chr(code) for code in np.flatnonzero(~fast_bpe._is_doubtful())]
    assert len(characters) > 100_000
    for start in range(0, len(characters), 4000):
        text = "".join(f"a{character}b  {character} 1" for character in characters[start : start + 4000])
        assert_equal(engine(kind), make(kind), text)


@pytest.mark.parametrize("name", ["pythia-20b", "multi-bpe-8k"])
def test_real_text_has_the_ids_of_the_library(name):
    if not SHARED.is_dir():
        pytest.skip("the shared corpus is not here")
    reference = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizers" / name / "tokenizer.json"))
    fast = FastBpe(reference)
    for domain in ("en", "en2", "fr", "de", "ar", "ja", "code"):
        num_bytes = 0
        with gzip.open(SHARED / "corpus" / domain / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            while num_bytes < 300_000:
                text = json.loads(next(lines))["text"]
                num_bytes += len(text.encode())
                # A rare character may send a text to the library.
                if not has_doubtful_characters(text):
                    assert_equal(fast, reference, text)


@pytest.mark.parametrize("text", ["\u08c7", "a\u0bfb\u0bfc", "\U00010d24", "\U0010ffff", chr(fast_bpe.FIRST_STAND_IN)])
def test_characters_that_versions_of_unicode_disagree_about_are_left_to_the_library(text):
    assert engine("gpt-neox").encode(f"abc {text}") is None
    ids = CheckedEncoder(make("gpt-neox")).encode(f"abc {text}").tolist()
    assert ids == make("gpt-neox").encode(f"abc {text}").ids


def test_white_space_of_any_length_is_encoded():
    for length, is_left in ((99_998, False), (100_001, True)):
        text = " a" + "\n" * length + "b"
        assert (engine("gpt-2").encode(text) is None) == is_left
        assert CheckedEncoder(make("gpt-2")).encode(text).tolist() == make("gpt-2").encode(text).ids


def test_special_tokens_come_from_text_only_where_the_library_lets_them():
    reference = tokenizers.Tokenizer.from_str(make("gpt-neox").to_str())
    text = "a<|endoftext|>  b<|padding|>"
    assert 0 in FastBpe(reference).encode(text)
    reference.encode_special_tokens = True
    assert 0 not in FastBpe(reference).encode(text)
    assert_equal(FastBpe(reference), reference, text)


def test_added_tokens_that_lie_across_each_other_are_found_as_the_library_finds_them():
    reference = tokenizers.Tokenizer.from_str(make("gpt-2").to_str())
    reference.add_tokens([AddedToken(token, normalized=False) for token in ("ab", "bcd", "abc", "cd")])
    for text in ("abcd", "xabbcd", "ababcdcd", "bcdcd abc"):
        assert_equal(FastBpe(reference), reference, text)


def changed(kind="gpt-2", **changes) -> tokenizers.Tokenizer:
    content = json.loads(make(kind).to_str())
    for place, value in changes.items():
        *path, last = place.split("__")
        target = content
        for name in path:
            target = target[name]
        target[last] = value
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def with_added(**options) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(make("gpt-neox").to_str())
    reference.add_tokens([AddedToken(options.pop("content", "<x>"), **options)])
    return reference


def with_merge(left: str, right: str) -> tokenizers.Tokenizer:
    content = json.loads(make("gpt-2").to_str())
    for token in (left, right, left + right):
        content["model"]["vocab"].setdefault(token, len(content["model"]["vocab"]))
    content["model"]["merges"].append([left, right])
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def another_way_to_a_token() -> tuple[str, str]:
    model = json.loads(make("gpt-2").to_str())["model"]
    return next(
        (token[:cut], token[cut:])
        for token in model["vocab"]
        for cut in range(1, len(token))
        if token[:cut] in model["vocab"] and token[cut:] in model["vocab"]
        if [token[:cut], token[cut:]] not in model["merges"]
    )


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (lambda: changed(pre_tokenizer__add_prefix_space=True), "its way to cut text into words is none"),
        (lambda: changed(pre_tokenizer={"type": "Whitespace"}), "its way to cut text into words is none"),
        (lambda: changed(normalizer={"type": "NFKC"}), "its normaliser is NFKC, neither NFC nor none"),
        (lambda: changed(model__dropout=0.1), "its model is not plain byte-level BPE"),
        (lambda: changed(model__byte_fallback=True), "its model is not plain byte-level BPE"),
        (lambda: changed(model__end_of_word_suffix="</w>", model__merges=[]), "it marks the parts of words"),
        (lambda: changed(model__vocab={"a": 0, "b": 1}, model__merges=[]), "its vocabulary does not hold all bytes"),
        (lambda: changed(model__ignore_merges=True, model__merges=[]), "some of its tokens come from no merge"),
        (lambda: with_merge(*another_way_to_a_token()), "some of its tokens are merged in several ways"),
        # Known already; the merge now comes after those that need it.
        (lambda: with_merge("t", "h"), "some of its tokens do not come from their own bytes"),
        (lambda: with_merge("東", "t"), "a token holds '東', which stands for no byte"),
        (lambda: with_added(lstrip=True), "its added token '<x>' strips text or must be a word"),
        (lambda: with_added(single_word=True), "its added token '<x>' strips text or must be a word"),
        (lambda: with_added(content="e\u0301", normalized=True), "its added token 'e\u0301' is not in normal form"),
    ],
)
def test_tokenizers_of_other_shapes_are_not_served_and_the_reason_is_told(reference, reason):
    with pytest.raises(NotServed, match=re.escape(reason)):
        FastBpe(reference())


def test_an_old_tiktoken_is_not_served(monkeypatch):
    monkeypatch.setattr("tiktoken.__version__", "0.12.0")
    with pytest.raises(NotServed, match=r"0\.12\.0 is too old; pip install --upgrade"):
        FastBpe(make("gpt-2"))


def test_a_tokenizer_without_added_tokens_is_served():
    reference = changed(added_tokens=[])
    assert_equal(FastBpe(reference), reference, SOURCES[0])
