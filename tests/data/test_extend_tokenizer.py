"""An extended tokenizer: every old id means the same, no text takes more tokens, and every text comes back."""

from __future__ import annotations

import argparse
import filecmp
import functools
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from cpt.cli import data
from cpt.config import Fault
from cpt.data.prepare import further_merges, long_texts
from cpt.data.prepare.checked_encoder import CheckedEncoder
from cpt.data.prepare.extend_tokenizer import check_extension, extend_tokenizer
from cpt.data.prepare.fast_bpe import PATTERNS
from cpt.data.prepare.pieces import Vocabulary
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.train_tokenizer import train_tokenizer

OLD_TEXT = "The old man went down to the sea again, and the sea was calm. He had 12 fish and 1345 nets.\n\n"
NEW_TEXT = (
    "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"
    "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du.\n"
    "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。"
    "Die Vögelein schweigen im Walde, warte nur, balde.\n"
    "    def gipfel(self):\n\t\treturn 1345678 == 1345678  # ----------\n\n"
)
NEW_SIZE = 440
KINDS = ("neox", "llama-3", "own bytes", "own sentencepiece", "metaspace", "model", "model with prefix")
SPACES = [AddedToken(" " * number, normalized=True) for number in (4, 3, 2)]
ANY_TEXT = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from([*NEW_TEXT[:70:3], "  ", "   ", "\n", "\u2581", "</s>", "<0x0A>", "<|endoftext|>", "é"])
    ).map("".join),
)


def write_text(path: Path, text: str, count: int = 30) -> Path:
    path.write_text("".join(json.dumps({"text": f"{text * 2}{n * 7919}"}) + "\n" for n in range(count)))
    return path


def byte_level(folder: Path, pattern: str | None, added: list, **model) -> Path:
    """A tokenizer.json of others, with added tokens behind the model's vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    else:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[] if pattern else ["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([OLD_TEXT * 9], trainer)
    tokenizer.add_tokens(added)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text("{}")
    return folder


def metaspace(folder: Path) -> Path:
    """Llama 2's kind of tokenizer.json: BPE with byte fallback over text whose spaces are U+2581."""
    train_tokenizer([write_text(folder.parent / "old.jsonl", OLD_TEXT)], folder.parent / "own", 300)
    model = json.loads((folder.parent / "own" / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|extra|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def model_only(folder: Path, **options) -> Path:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([OLD_TEXT.strip()] * 20),
        model_prefix=str(folder / "tokenizer"),
        **{"vocab_size": 310, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options},
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def make(kind: str, folder: Path) -> Path:
    match kind:
        case "neox":
            return byte_level(folder, None, SPACES)
        case "llama-3":
            added = [AddedToken(name, special=True) for name in ("<|endoftext|>", "<|begin of text|>")]
            return byte_level(folder, next(iter(PATTERNS)), added, ignore_merges=True)
        case "metaspace":
            return metaspace(folder)
        case "model":
            options = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "split_digits": True}
            return model_only(folder, normalization_rule_name="identity", **options)
        case "model with prefix":
            return model_only(folder)
    train_tokenizer(
        [write_text(folder.parent / "old.jsonl", OLD_TEXT)],
        folder,
        330,
        "byte-bpe" if kind == "own bytes" else "sentencepiece",
    )
    return folder


class Pair:
    """A tokenizer of a kind, and what it is extended to."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.old_folder, self.new_folder = kind, make(kind, folder / "base"), folder / "extended"
        self.text = write_text(folder / "new.jsonl", NEW_TEXT)
        self.report = extend_tokenizer(self.old_folder, [self.text], self.new_folder, NEW_SIZE)
        self.old, self.new = Tokenizer.open(self.old_folder), Tokenizer.open(self.new_folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "-")))


def test_old_ids_mean_the_same_and_new_ones_follow_them_all(pair):
    old, new = pair.old._pieces(), pair.new._pieces()
    assert new.items() >= old.items()
    assert sorted(new[piece] for piece in new.keys() - old.keys()) == list(range(pair.old.vocabulary_size, NEW_SIZE))
    assert pair.new.vocabulary_size == NEW_SIZE == pair.report.vocabulary_size
    special = [(t.end_of_document, t.begin_of_document, t.unknown, t.padding) for t in (pair.old, pair.new)]
    assert special[0] == special[1]


def test_new_text_takes_fewer_tokens_and_the_report_says_how_many(pair):
    texts = [json.loads(line)["text"] for line in pair.text.read_text().splitlines()]
    before, after = (sum(t.encode(text).size for text in texts) for t in (pair.old, pair.new))
    assert (pair.report.tokens_before, pair.report.tokens_after) == (before, after)
    assert after < 0.6 * before
    assert all(pair.new.encode(text).size <= pair.old.encode(text).size for text in texts)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back_as_before_in_no_more_tokens(pair, text):
    ids, new_ids = pair.old.encode(text), pair.new.encode(text)
    assert pair.new.decode(new_ids) == pair.old.decode(ids)
    assert new_ids.size <= ids.size
    if pair.kind in ("llama-3", "own bytes", "own sentencepiece"):
        assert pair.new.decode(new_ids) == text


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_text_is_cut_as_before_and_then_joined_further(pair, text):
    """Spelled in old pieces, new tokens give the old cut: what makes their rows means of what was there."""
    before, after = Vocabulary.of(pair.old), Vocabulary.of(pair.new)
    spelled = [
        old_id
        for token_id in pair.new.encode(text).tolist()
        for old_id in ([token_id] if token_id < before.size else after.cut(token_id, before))
    ]
    assert spelled == pair.old.encode(text).tolist()


def test_line_ends_and_other_characters_of_one_byte_stay_the_tokens_they_were(pair):
    for text in map(chr, range(0x20)):
        assert pair.new.encode(text).tolist() == pair.old.encode(text).tolist()


def test_words_of_the_pre_tokenizer_are_not_joined(pair):
    old = pair.old._pieces()
    for piece in pair.new._pieces().keys() - old.keys():
        text = piece.replace("\u2581", " ").replace("Ġ", " ")
        assert " " not in text.strip(" "), piece
        assert "\u2581" not in piece.lstrip("\u2581"), piece


def test_digits_stay_alone_where_they_did(tmp_path):
    (tmp_path / "bytes").mkdir()
    pair = Pair("model", tmp_path)
    assert not [piece for piece in pair.new._pieces() if sum(map(str.isdigit, piece)) > 1 and piece[0] != "<"]
    assert any("1345678" in piece for piece in Pair("own bytes", tmp_path / "bytes").new._pieces())


def test_transformers_gives_the_same_ids(pair, tmp_path):
    from transformers import AutoTokenizer

    if pair.kind.startswith("model"):
        pytest.skip("transformers makes a tokenizer of a SentencePiece model by rules of its own; see the next test")
    pair.new.copy_to(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox" if pair.kind == "neox" else "llama"}))
    config = tmp_path / "tokenizer_config.json"
    if not config.is_file():
        config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == NEW_SIZE
    for text in (NEW_TEXT, OLD_TEXT, "   <|x|>  é"):
        assert auto(text, add_special_tokens=False).input_ids == pair.new.encode(text).tolist()
        assert auto.decode(pair.new.encode(text)) == pair.new.decode(pair.new.encode(text))


@pytest.mark.parametrize("kind", ["model", "model with prefix"])
def test_transformers_reads_an_extended_model_as_it_reads_the_old_one(kind, tmp_path):
    from transformers import AutoTokenizer

    pair, autos = Pair(kind, tmp_path), []
    for folder in (pair.old_folder, pair.new_folder):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        autos.append(AutoTokenizer.from_pretrained(folder))
    for text in (NEW_TEXT, OLD_TEXT):
        ids, new_ids = (auto(text, add_special_tokens=False).input_ids for auto in autos)
        assert len(new_ids) <= len(ids)
        assert autos[1].decode(new_ids) == autos[0].decode(ids)
    assert len(autos[1](NEW_TEXT).input_ids) < 0.6 * len(autos[0](NEW_TEXT).input_ids)


@pytest.mark.parametrize("kind", ["neox", "llama-3"])
def test_the_fast_engine_serves_it_with_the_same_ids(kind, tmp_path):
    pytest.importorskip("tiktoken")
    new = Pair(kind, tmp_path).new
    reference = tokenizers.Tokenizer.from_file(str(new.deciding_file))
    encoder = CheckedEncoder(reference)
    for text in (NEW_TEXT, OLD_TEXT, "   <|endoftext|>  é"):
        assert encoder.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids
    assert encoder.engine == "tiktoken"


def test_both_files_of_a_folder_are_extended_alike(tmp_path):
    pair = Pair("own sentencepiece", tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(pair.new_folder / "tokenizer.model"))
    assert model.get_piece_size() == NEW_SIZE
    for text in (NEW_TEXT, OLD_TEXT, "\u2581 é 漢 </s>"):
        assert model.encode(text) == pair.new.encode(text).tolist()


def test_companions_are_copied_but_for_the_old_vocabulary(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pair = Pair("neox", tmp_path)
    assert sorted(path.name for path in pair.new_folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmp(*(f / "tokenizer_config.json" for f in (pair.old_folder, pair.new_folder)), shallow=False)
    assert "vocab.json holds the old vocabulary and is left out" in caplog.text


@pytest.mark.parametrize("fault", ["other pieces", "unigram", "other ids"])
def test_a_model_beside_the_deciding_file_that_does_not_fit_is_left_out(fault, tmp_path, caplog):
    base = make("own sentencepiece", tmp_path / "base")
    if fault == "other ids":
        content = json.loads((base / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], {"type": "Lowercase"}]}
        (base / "tokenizer.json").write_text(json.dumps(content))
    else:
        options = {"model_type": "unigram", "vocab_size": 285} if fault == "unigram" else {}
        other = model_only(tmp_path / "other", **options)
        (base / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    with caplog.at_level(logging.WARNING):
        extend_tokenizer(base, [write_text(tmp_path / "new.jsonl", NEW_TEXT)], tmp_path / "t", 440)
    assert not (tmp_path / "t" / "tokenizer.model").exists()
    told = {
        "other pieces": "has other entries than tokenizer.json beside it and is left out",
        "unigram": "is left out: .*tokenizer.model is a Unigram model",
        "other ids": "tokenizer.model would give other ids than tokenizer.json and is left out",
    }
    assert re.search(told[fault], caplog.text)


def test_merges_are_written_in_the_style_of_the_file(tmp_path):
    base = make("own bytes", tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (base / "tokenizer.json").write_text(json.dumps(content))
    extend_tokenizer(base, [write_text(tmp_path / "new.jsonl", NEW_TEXT)], tmp_path / "t", 440)
    merges = json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges[: len(content["model"]["merges"])] == content["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)


def test_an_extended_tokenizer_can_be_extended_again(tmp_path):
    pair = Pair("neox", tmp_path)
    text = write_text(tmp_path / "third.jsonl", "Quousque tandem abutere, Catilina, patientia nostra? " * 3)
    extend_tokenizer(pair.new_folder, [text], tmp_path / "t", NEW_SIZE + 20)
    assert check_extension(pair.new, Tokenizer.open(tmp_path / "t"), [NEW_TEXT, OLD_TEXT])[0] > 0


def test_no_merge_leads_to_a_special_token(tmp_path):
    base = byte_level(tmp_path / "base", None, [AddedToken("<<>>", special=True, single_word=True)])
    text = write_text(tmp_path / "new.jsonl", "a<<>>b and c<<>>d " * 20)
    extend_tokenizer(base, [text], tmp_path / "t", 336)
    old, new = Tokenizer.open(base), Tokenizer.open(tmp_path / "t")
    assert new.encode("<<>>").tolist() == old.encode("<<>>").tolist() == [old.vocabulary_size - 1]
    assert new.encode("a<<>>b").size < old.encode("a<<>>b").size
    assert old.vocabulary_size - 1 not in new.encode("a<<>>b")


def test_the_same_text_gives_the_same_bytes(tmp_path):
    base, text = make("own sentencepiece", tmp_path / "base"), write_text(tmp_path / "new.jsonl", NEW_TEXT)
    for name in ("one", "two"):
        extend_tokenizer(base, [text], tmp_path / name, 440, sample_bytes=4000, seed=3)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names


def test_long_documents_are_learned_from_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(long_texts, "LONGEST_AT_ONCE", 50)
    assert Pair("neox", tmp_path).report.tokens_after > 0


def test_of_a_large_script_half_of_the_new_entries_are_characters(tmp_path):
    base = make("model", tmp_path / "base")
    drawn = random.Random(0).choices(range(60), k=900)
    text = write_text(tmp_path / "new.jsonl", "".join(chr(0x4E00 + number) for number in drawn))
    extend_tokenizer(base, [text], tmp_path / "t", 310 + 40)
    new = [len(piece) for piece in list(Tokenizer.open(tmp_path / "t")._pieces())[310:]]
    assert new.count(1) == 20 and max(new) <= further_merges.LONGEST_PIECE


@pytest.mark.parametrize("kind", ["own bytes", "own sentencepiece", "model"])
def test_the_size_named_in_a_refusal_is_the_true_limit(kind, tmp_path):
    base, text = make(kind, tmp_path / "base"), write_text(tmp_path / "new.jsonl", NEW_TEXT, 3)
    with pytest.raises(Fault, match=r"a vocabulary of 60,000 is too large for this text, which yields [\d,]+") as told:
        extend_tokenizer(base, [text], tmp_path / "t", 60_000)
    assert not (tmp_path / "t").exists()
    limit = int(str(told.value).split("--vocab-size ")[1].split()[0])
    assert extend_tokenizer(base, [text], tmp_path / "t", limit).vocabulary_size == limit


def test_a_total_that_is_not_above_the_old_size_is_refused(tmp_path):
    base = make("own bytes", tmp_path / "base")
    with pytest.raises(Fault, match="has 330 entries already; --vocab-size is the new total, 331 or more"):
        extend_tokenizer(base, [write_text(tmp_path / "a.jsonl", NEW_TEXT)], tmp_path / "t", 330)


def test_text_without_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(Fault, match=r"no document with text in .*a\.jsonl; a tokenizer is learned from text"):
        extend_tokenizer(make("own bytes", tmp_path / "base"), [tmp_path / "a.jsonl"], tmp_path / "t", 400)


def plain_json(folder: Path, model, pre_tokenizer=None) -> Path:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda f: model_only(f, model_type="unigram", vocab_size=285), "is a Unigram model; only BPE over bytes and"),
        (lambda f: model_only(f, byte_fallback=False, vocab_size=50), "has no byte fallback; only BPE over bytes and"),
        (lambda f: plain_json(f, models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), "is a WordPiece model; only BPE"),
        (lambda f: plain_json(f, models.BPE({"a": 0}, [])), "is BPE neither over bytes nor with byte fallback"),
        (
            lambda f: plain_json(f, models.BPE({"a": 0}, [], dropout=0.1), pre_tokenizers.ByteLevel()),
            "drops merges or marks the parts of words; only plain BPE",
        ),
    ],
    ids=["unigram", "no fallback", "wordpiece", "characters", "dropout"],
)
def test_a_tokenizer_of_another_kind_is_refused(build, told, tmp_path):
    text = write_text(tmp_path / "new.jsonl", NEW_TEXT)
    with pytest.raises(Fault, match=told):
        extend_tokenizer(build(tmp_path / "base"), [text], tmp_path / "t", 5000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<pad>": 310}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {}, "310": {"content": "<pad>"}}}),
    ],
)
def test_a_model_with_tokens_added_outside_it_is_refused(name, content, tmp_path):
    base = make("model", tmp_path / "base")
    (base / name).write_text(json.dumps(content))
    text = write_text(tmp_path / "new.jsonl", NEW_TEXT)
    told = r"token 310 is added outside tokenizer\.model, which has 310 pieces; make a tokenizer\.json of both"
    with pytest.raises(Fault, match=told):
        extend_tokenizer(base, [text], tmp_path / "t", 400)


def test_what_is_no_extension_is_found_out(tmp_path):
    neox, other = make("neox", tmp_path / "neox"), make("own bytes", tmp_path / "own")
    small = Tokenizer.open(other)
    train_tokenizer([write_text(tmp_path / "a.jsonl", NEW_TEXT)], tmp_path / "large", 400, "byte-bpe")
    with pytest.raises(Fault) as told:
        check_extension(Tokenizer.open(tmp_path / "large"), small, [NEW_TEXT])
    assert "cannot be extended:" in told.value.lines[0]
    assert "old ids would change: id " in told.value.lines[1]
    assert "a text would take" in told.value.lines[2]
    with pytest.raises(Fault, match="a text would not come back: 'e\u0301"):
        check_extension(small, Tokenizer.open(neox), ["e\u0301"])
    with pytest.raises(Fault, match="one writes its pieces in bytes, the other in characters"):
        check_extension(small, Tokenizer.open(make("model", tmp_path / "model")), ["a"])


def run(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="cpt data")
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in words]))


def test_the_command_tells_what_was_learned_and_what_it_is_worth(tmp_path, capsys, monkeypatch):
    base, text = make("own bytes", tmp_path / "base"), write_text(tmp_path / "new.jsonl", NEW_TEXT)
    words = ("tokenizer", text, "--extend", base, "--vocab-size", 440)
    assert run(*words, "--output", tmp_path / "t") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"extended {tmp_path}/t: 330 entries and 110 further ones, from 30 documents, ")
    before, after = (Tokenizer.open(folder) for folder in (base, tmp_path / "t"))
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    num_bytes = sum(len(t.encode()) for t in texts)
    rates = [num_bytes / sum(np.size(tokenizer.encode(t)) for t in texts) for tokenizer in (before, after)]
    assert lines[1] == f"bytes a token on this text: {rates[0]:.2f} before, {rates[1]:.2f} now"
    monkeypatch.setattr(data, "extend_tokenizer", functools.partial(data.extend_tokenizer, sample_bytes=2000))
    run(*words, "--output", tmp_path / "sampled")
    assert "from a sample of 1" in capsys.readouterr().out


def test_a_kind_beside_extend_is_refused(tmp_path):
    base = make("own bytes", tmp_path / "base")
    with pytest.raises(Fault, match="--kind = byte-bpe: an extended tokenizer is of the kind of .*base; leave out"):
        run("tokenizer", "a", "--extend", base, "--vocab-size", 440, "--output", tmp_path / "t", "--kind", "byte-bpe")
