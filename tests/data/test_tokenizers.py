"""Tokenizers of others open by either engine, with their special tokens, and encode as their own library does."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import xxhash
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from cpt.config import Fault
from cpt.data.prepare.tokenizers import Tokenizer

TEXTS = ["the cat sat on the mat", "a dog and a cat ran home", "where did the dog sit"] * 20


def write_json(folder: Path, special=("<|endoftext|>",), **config) -> Path:
    """A byte-level tokenizer.json as others make it; with `config`, a tokenizer_config.json too."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_model(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_json_tokenizer_gives_the_ids_of_its_library(tmp_path):
    tokenizer = Tokenizer.open(write_json(tmp_path / "t"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    ids = tokenizer.encode("the cat übt\n  sitting")
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs.encode("the cat übt\n  sitting").ids
    assert tokenizer.decode(ids) == "the cat übt\n  sitting"
    assert tokenizer.vocabulary_size == 280


def test_a_sentencepiece_model_gives_the_ids_of_its_library(tmp_path):
    tokenizer = Tokenizer.open(write_model(tmp_path / "t" / "tokenizer.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    assert tokenizer.encode("the cat übt").dtype == np.int32
    assert tokenizer.encode("the cat übt").tolist() == theirs.encode("the cat übt")
    assert tokenizer.decode(tokenizer.encode("the cat übt")) == "the cat übt"
    assert (tokenizer.unknown, tokenizer.begin_of_document, tokenizer.end_of_document) == (0, 1, 2)
    assert tokenizer.vocabulary_size == 300


def test_no_special_tokens_are_put_around_a_text(tmp_path):
    folder = write_json(tmp_path, special=("<s>", "</s>"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = Tokenizer.open(folder).encode("the cat")
    assert 0 not in ids and 1 not in ids


def test_truncation_and_padding_saved_in_the_file_have_no_effect(tmp_path):
    folder = write_json(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "the dog sat on the cat and ran home"
    assert Tokenizer.open(folder).decode(Tokenizer.open(folder).encode(text)) == text


@pytest.mark.parametrize(
    ("special", "config", "end", "begin"),
    [
        (("<|endoftext|>",), {}, 0, None),
        (("<unk>", "<s>", "</s>"), {}, 2, 1),
        (("<a>", "<b>"), {"eos_token": "<b>", "bos_token": "<a>"}, 1, 0),
        (("<a>", "<b>"), {"eos_token": {"content": "<b>", "lstrip": False}}, 1, None),
        (("<a>", "</s>"), {"eos_token": "<a>"}, 0, None),
        (("<a>",), {"eos_token": None, "bos_token": "<nowhere>"}, None, None),
    ],
)
def test_special_tokens_are_those_the_files_name_else_the_usual_ones(tmp_path, special, config, end, begin):
    tokenizer = Tokenizer.open(write_json(tmp_path, special, **config))
    assert (tokenizer.end_of_document, tokenizer.begin_of_document) == (end, begin)


def test_the_token_for_padding_is_the_one_that_is_named_else_the_usual_one(tmp_path):
    assert Tokenizer.open(write_json(tmp_path / "a", ("<a>", "<|padding|>"))).padding == 1
    assert Tokenizer.open(write_json(tmp_path / "b", ("<a>", "<|padding|>"), pad_token="<a>")).padding == 0
    assert Tokenizer.open(write_json(tmp_path / "c")).padding is None
    assert Tokenizer.open(write_model(tmp_path / "d.model")).padding is None
    assert Tokenizer.open(write_model(tmp_path / "e.model", pad_id=3)).padding == 3


def test_tokens_for_single_bytes_are_byte_pieces_else_bytes_that_are_no_character(tmp_path):
    model = Tokenizer.open(write_model(tmp_path / "d.model"))
    assert model.byte_tokens.tolist() == list(range(3, 259))
    byte_level = Tokenizer.open(write_json(tmp_path / "a"))
    expected = {
        token_id for character in ("\u00e9", "\u6f22", "\U0001f600") for token_id in byte_level.encode(character)
    }
    assert len(byte_level.byte_tokens) == 128
    assert expected <= set(byte_level.byte_tokens.tolist())
    assert not set(byte_level.encode("a cat\n")) & set(byte_level.byte_tokens.tolist())


def test_the_engine_can_be_forced_where_it_can_serve(tmp_path):
    folder = write_json(tmp_path / "a")
    forced = Tokenizer.open(folder, "huggingface")
    assert forced.engine == "the package tokenizers; tiktoken is faster, but it was not asked for"
    assert forced.encode("the cat").tolist() == Tokenizer.open(folder).encode("the cat").tolist()
    model = write_model(tmp_path / "d.model")
    assert Tokenizer.open(model).engine == "the package sentencepiece"
    with pytest.raises(Fault, match=r"huggingface reads no SentencePiece model, and .*d\.model is one; leave --engine"):
        Tokenizer.open(model, "huggingface")
    with pytest.raises(Fault, match="engine = 'fastest'; known: auto, huggingface"):
        Tokenizer.open(folder, "fastest")


def test_the_special_tokens_map_is_read_and_the_config_has_the_last_word(tmp_path):
    write_json(tmp_path, ("<a>", "<b>", "<c>"), eos_token="<b>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<a>", "bos_token": "<c>"}))
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.end_of_document, tokenizer.begin_of_document) == (1, 2)


def test_a_special_token_in_a_text_is_what_transformers_takes_it_for(tmp_path):
    plain = Tokenizer.open(write_json(tmp_path / "plain"))
    splitting = Tokenizer.open(write_json(tmp_path / "splitting", split_special_tokens=True))
    assert plain.encode("a<|endoftext|>b").tolist().count(0) == 1
    assert splitting.encode("a<|endoftext|>b").tolist().count(0) == 0
    assert splitting.decode(splitting.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_the_vocabulary_ends_at_the_largest_id_even_if_ids_are_missing(tmp_path):
    folder = write_json(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.vocabulary_size == int(tokenizer.encode("<|far|>").max()) + 1


def test_the_json_file_decides_where_a_folder_has_both(tmp_path):
    write_json(tmp_path)
    write_model(tmp_path / "tokenizer.model")
    assert Tokenizer.open(tmp_path).end_of_document == 0
    assert Tokenizer.open(tmp_path / "tokenizer.model").end_of_document == 2


def test_the_hash_is_that_of_the_file_that_decides(tmp_path):
    write_json(tmp_path, eos_token="<|endoftext|>")
    before = Tokenizer.open(tmp_path).hash
    assert before == xxhash.xxh64((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.open(tmp_path).hash == before


def test_files_are_copied_byte_for_byte_under_their_usual_names(tmp_path):
    write_json(tmp_path / "t", eos_token="<|endoftext|>")
    (tmp_path / "t" / "weights.bin").write_bytes(b"not a tokenizer's file")
    Tokenizer.open(tmp_path / "t").copy_to(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes()
    Tokenizer.open(write_model(tmp_path / "u" / "mine.model")).copy_to(tmp_path / "renamed")
    assert [path.name for path in (tmp_path / "renamed").iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("files", "opened", "message"),
    [
        ({}, "gone", "there is no tokenizer at .*gone; cpt data tokenizer trains one"),
        ({"x.txt": ""}, "", "has neither tokenizer.json nor tokenizer.model; name a folder or file"),
        ({"vocab.json": "{}"}, "", r"has vocab.json but no tokenizer.json; make one with transformers\.AutoTokenizer"),
        ({"tokenizer.json": "{"}, "", r"cannot read the tokenizer .*tokenizer\.json: "),
        ({"tokenizer.model": "x"}, "", r"cannot read the SentencePiece model .*tokenizer\.model: "),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, opened, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(Fault, match=message):
        Tokenizer.open(tmp_path / opened)


def test_a_broken_configuration_is_named(tmp_path):
    write_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{eos")
    with pytest.raises(Fault, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.open(tmp_path)


def test_added_tokens_that_are_not_special_stay_in_the_text(tmp_path):
    folder = write_json(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tab>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    opened = Tokenizer.open(folder)
    assert 280 in opened.encode("a<tab>b")
    assert opened.decode(opened.encode("a<tab>b")) == "a<tab>b"
