"""Whatever the fast engine does, a text gets the ids of the tokenizers library, and the log says who serves."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from cpt.data.prepare import checked_encoder
from cpt.data.prepare.checked_encoder import CheckedEncoder
from cpt.data.prepare.tokenizers import Tokenizer

TEXT = "the cat sat on the mat and the dog ran home"


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


class PlantedEngine:
    """The library itself, but wrong where a text holds `trap`; it counts its calls."""

    def __init__(self, reference: tokenizers.Tokenizer, trap: str, is_shorter: bool = False) -> None:
        self._reference, self._trap, self._is_shorter = reference, trap, is_shorter
        self.num_calls = 0

    def encode(self, text: str) -> np.ndarray | None:
        self.num_calls += 1
        if "?" in text:
            return None
        encoding = self._reference.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._trap in text:
            wrong = encoding.char_to_token(text.index(self._trap))
            if self._is_shorter:
                return ids[:wrong]
            ids[wrong] += 1
        return ids


@pytest.mark.parametrize("is_shorter", [False, True])
def test_a_wrong_engine_is_caught_at_its_position_and_replaced_for_good(reference, caplog, is_shorter):
    planted = PlantedEngine(reference, "zebra", is_shorter)
    encoder = CheckedEncoder(reference, lambda _: planted)
    assert encoder.engine == "tiktoken"
    assert encoder.description == (
        "the package tiktoken, held against tokenizers on the first 200,000 characters and on 10,000 of every input "
        "file"
    )
    for text in (TEXT, f"{TEXT} zebra", TEXT):
        assert encoder.encode(text).tolist() == reference.encode(text).ids
    assert encoder.engine == "tokenizers"
    # The text of traps, the sound text and the one that gave it away.
    assert planted.num_calls == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("tiktoken gives other ids than tokenizers at character 44 of the text")
    assert warning.endswith("zebra'; tokenizers serves from here on")


def test_an_engine_wrong_on_the_traps_never_serves(reference, caplog):
    encoder = CheckedEncoder(reference, lambda _: PlantedEngine(reference, "東京"))
    assert encoder.engine == "tokenizers"
    assert "tiktoken gives other ids than tokenizers" in caplog.text
    assert encoder.encode(TEXT).tolist() == reference.encode(TEXT).ids


def test_after_the_first_texts_only_the_fast_engine_encodes(reference, monkeypatch):
    monkeypatch.setattr(checked_encoder, "VERIFIED_CHARACTERS", len(TEXT) + 1)
    encoder = CheckedEncoder(reference, lambda _: PlantedEngine(reference, "zebra"))
    # What the library had to encode was not verified.
    encoder.encode(f"{TEXT} why?")
    encoder.encode(TEXT)
    encoder.encode(TEXT)
    assert encoder.encode("a zebra").tolist() != reference.encode("a zebra").ids
    assert encoder.encode("a zebra?").tolist() == reference.encode("a zebra?").ids


def test_a_long_text_that_the_fast_engine_leaves_to_the_library_is_encoded(reference, monkeypatch):
    monkeypatch.setattr(checked_encoder, "VERIFIED_CHARACTERS", 5)
    encoder = CheckedEncoder(reference, lambda _: PlantedEngine(reference, "zebra"))
    text = f"why? {TEXT} why?"
    assert encoder.encode(text).tolist() == reference.encode(text).ids


def test_every_input_is_checked_anew(reference, monkeypatch, caplog):
    monkeypatch.setattr(checked_encoder, "VERIFIED_CHARACTERS", 1)
    monkeypatch.setattr(checked_encoder, "VERIFIED_OF_EACH_INPUT", len(TEXT) + 10)
    encoder = CheckedEncoder(reference, lambda _: PlantedEngine(reference, "zebra"))
    for number in range(3):
        encoder.begin_input()
        encoder.encode(TEXT)
        zebra = f"zebra {number}"
        # The second text of an input ends the sample.
        assert encoder.encode(zebra).tolist() == reference.encode(zebra).ids
        assert encoder.engine == "tokenizers"
    assert caplog.text.count("serves from here on") == 1


def test_of_a_long_text_only_the_beginning_is_encoded_by_both(reference, monkeypatch):
    monkeypatch.setattr(checked_encoder, "VERIFIED_CHARACTERS", 50)
    asked = []

    class Recording:
        def __getattr__(self, name):
            return getattr(reference, name)

        def encode(self, text, **options):
            asked.append(len(text))
            return reference.encode(text, **options)

    encoder = CheckedEncoder(Recording(), lambda _: PlantedEngine(reference, "zebra"))
    asked.clear()
    text = " ".join([TEXT] * 20)
    assert encoder.encode(text).tolist() == reference.encode(text).ids
    assert max(asked) == 50


def test_without_tiktoken_the_library_serves_and_says_how_to_get_it(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encoder = CheckedEncoder(reference)
    assert encoder.engine == "tokenizers"
    assert encoder.encode(TEXT).tolist() == reference.encode(TEXT).ids
    assert encoder.description == (
        "the package tokenizers; tiktoken is faster, but it is not installed; pip install 'cpt-trainer[fast]' adds it"
    )


def test_nobody_is_told_to_install_tiktoken_for_a_tokenizer_that_it_cannot_serve(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    other = tokenizers.Tokenizer.from_str(reference.to_str())
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    assert CheckedEncoder(other).description == (
        "the package tokenizers; tiktoken is faster, but its way to cut text into words is none of those known here"
    )


def test_a_tokenizer_tells_its_engine(reference, tmp_path):
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.engine.startswith("the package t")
    assert tokenizer.encode(TEXT).dtype == np.int32
    assert tokenizer.encode(TEXT).tolist() == reference.encode(TEXT).ids
