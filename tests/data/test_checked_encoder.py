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
from cpt.data.prepare.fast_bpe import NotServed
from cpt.data.prepare.tokenizers import Tokenizer

TEXT = "the cat sat on the mat and the dog ran home"


@pytest.fixture(autouse=True)
def nothing_told():
    checked_encoder._tell.cache_clear()


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


def test_without_tiktoken_the_library_serves_and_the_log_says_once_how_to_get_it(reference, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        encoder = CheckedEncoder(reference)
        assert encoder.engine == "tokenizers"
        assert encoder.encode(TEXT).tolist() == reference.encode(TEXT).ids
    assert [record.getMessage() for record in caplog.records] == [
        "tokenizing with the package tokenizers; tiktoken is faster, but it is not installed; "
        "pip install 'cpt-trainer[fast]' adds it"
    ]


def test_the_log_says_why_a_tokenizer_is_not_served(reference, caplog):
    def refuse(_: tokenizers.Tokenizer) -> None:
        raise NotServed("it marks the parts of words")

    caplog.set_level(logging.INFO)
    assert CheckedEncoder(reference, refuse).engine == "tokenizers"
    assert "tokenizing with the package tokenizers; tiktoken is faster, but it marks the parts of words" in caplog.text


def test_the_log_says_that_the_fast_engine_serves(reference, caplog):
    caplog.set_level(logging.INFO)
    CheckedEncoder(reference, lambda _: PlantedEngine(reference, "zebra"))
    assert "tokenizing with the package tiktoken, held against tokenizers on the first 200,000 char" in caplog.text


def test_a_tokenizer_tells_its_engine(reference, tmp_path):
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.engine in ("tiktoken", "tokenizers")
    assert tokenizer.encode(TEXT).dtype == np.int32
    assert tokenizer.encode(TEXT).tolist() == reference.encode(TEXT).ids
