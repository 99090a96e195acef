"""A long text is encoded in parts, and has the ids of the whole whatever the tokenizer."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cpt.data.prepare import long_texts
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.train_tokenizer import train_tokenizer

SOURCE = inspect.getsource(argparse)
TEXTS = [
    SOURCE[:60_000],
    "Où est l'été ? C'est déjà là.\n\n東京は晴れ。\n" * 200,
    "----- ===== \t\t\t\n\n\n a" * 500,
    "x" * 5000,
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(long_texts, "LONGEST_AT_ONCE", 1000)
    monkeypatch.setattr(long_texts, "CONTEXT", 300)


def byte_level(folder: Path) -> Path:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=800, **options))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def like_llama(folder: Path) -> Path:
    """Without any cut into words, and with a sign for a space before every text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([line for text in TEXTS for line in text.split(" ")], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_of(folder: Path, text: Path) -> Path:
    train_tokenizer([text], folder, 500)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {
        "byte-level": byte_level(folder / "byte-level"),
        "like llama": like_llama(folder / "llama"),
        "sentencepiece": sentencepiece_of(folder / "sentencepiece", folder / "a.jsonl"),
    }


@pytest.mark.parametrize("kind", ["byte-level", "like llama", "sentencepiece"])
def test_the_ids_are_those_of_the_whole(tokenizer_folders, kind):
    folder = tokenizer_folders[kind]
    if kind == "sentencepiece":
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        library = model.encode
    else:
        reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library = lambda text: reference.encode(text, add_special_tokens=False).ids  # noqa: E731
    opened = Tokenizer.open(folder)
    for text in (*TEXTS, "".join(TEXTS), SOURCE[:30_000].replace("\n", "\r\n").replace("    ", "\t")):
        assert opened.encode(text).tolist() == library(text)


@pytest.mark.parametrize("kind", ["byte-level", "like llama", "sentencepiece"])
def test_no_part_of_ordinary_text_is_much_too_long(tokenizer_folders, kind):
    opened = Tokenizer.open(tokenizer_folders[kind])
    parts = list(long_texts.parts_of(SOURCE, opened._encode))
    assert len(parts) > 60
    assert max(map(len, parts)) <= 1000


def test_a_text_without_places_to_cut_stays_whole(tokenizer_folders):
    opened = Tokenizer.open(tokenizer_folders["byte-level"])
    assert list(long_texts.parts_of("x" * 5000, opened._encode)) == ["x" * 5000]
