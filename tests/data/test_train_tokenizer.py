"""A trained tokenizer loses nothing, and transformers, tokenizers and SentencePiece agree on every id."""

from __future__ import annotations

import filecmp
import json
import logging
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import Fault
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.prepare.train_tokenizer import ESCAPE, train_tokenizer

CODE = 'def run(self, name):\n    """Says a word."""\n    if not name:\n\t\treturn None\n\n    print(name, 12345)\n\n\n'
PROSE = "The old man went down to the sea again, and the sea was calm. Über allen Gipfeln ist Ruh. 吾輩は猫である。\n\n"
KINDS = ("sentencepiece", "byte-bpe")
AWKWARD = [
    "",
    " ",
    "  leading and trailing  ",
    "tabs\t\tand\n\n\nlines\r\n\x00\x0b",
    "\u2581 the sign that SentencePiece writes for a space, \u2581\u2581",
    f"{ESCAPE} {ESCAPE}0 {ESCAPE}1 {ESCAPE}\u2581{ESCAPE}{ESCAPE}1",
    "\u2409 \u2585 \u2586 \ufffd \ufeff \u200b",
    "<s> </s> <unk> <|endoftext|> <0x0A> <0xE2>",
    "e\u0301 \u00e9 ﬁ 😀👨‍👩‍👧 漢字 عربي",
    CODE * 2,
]
# Letters of what can go wrong, put together at random.
ANY_TEXT = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [" ", "    ", "\n", "\t", "\u2581", ESCAPE, "0", "1", "</s>", "<0x0A>", "def", "):\n", "é", "漢"]
        )
    ).map("".join),
)


def write_inputs(folder: Path, count: int = 40) -> Path:
    path = folder / "text.jsonl"
    # Documents differ in their numbers, so that samples of them differ.
    texts = ((CODE if number % 2 else PROSE) * 3 + f"number {number * 7919}" for number in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer([write_inputs(folder)], folder / "tokenizer", 450, request.param)
    return request.param, folder / "tokenizer"


@pytest.fixture(scope="module")
def readers(trained):
    """Everything that can encode with the trained tokenizer, by name."""
    from transformers import AutoTokenizer

    kind, folder = trained
    auto = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.open(folder)
    encoders = {
        "cpt": (lambda text: ours.encode(text).tolist(), ours.decode),
        "transformers": (lambda text: auto(text, add_special_tokens=False).input_ids, auto.decode),
    }
    if kind == "sentencepiece":
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encoders["sentencepiece"] = (model.encode, model.decode)
    return encoders


def check(text: str, readers) -> None:
    encoded = {name: encode(text) for name, (encode, _) in readers.items()}
    assert all(ids == encoded["cpt"] for ids in encoded.values()), encoded
    for name, (_, decode) in readers.items():
        assert decode(encoded["cpt"]) == text, name


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_texts_come_back_and_all_readers_agree(text, readers):
    check(text, readers)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back_and_all_readers_agree(text, readers):
    check(text, readers)


def test_readers_agree_on_real_text_and_a_vocabulary_learned_in_many_steps(tmp_path):
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))[:80]
    texts = [path.read_text(encoding="utf-8") for path in library]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::2]))
    train_tokenizer([tmp_path / "code.jsonl"], tmp_path / "t", 2000)
    ours = Tokenizer.open(tmp_path / "t")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    for text in texts[1::2]:
        ids = ours.encode(text).tolist()
        assert ids == model.encode(text)
        assert ours.decode(ids) == text == model.decode(ids)


def test_special_tokens_have_the_promised_ids(trained):
    kind, folder = trained
    tokenizer = Tokenizer.open(folder)
    ids = (tokenizer.unknown, tokenizer.begin_of_document, tokenizer.end_of_document)
    assert ids == ((0, 1, 2) if kind == "sentencepiece" else (0, 0, 0))
    assert tokenizer.vocabulary_size == 450
    if kind == "sentencepiece":
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_transformers_reads_it_beside_a_model_of_any_family(trained, model_type, tmp_path):
    from transformers import AutoTokenizer

    _, folder = trained
    Tokenizer.open(folder).copy_to(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.open(folder)
    assert auto.eos_token_id == ours.end_of_document
    for text in AWKWARD:
        assert auto(text, add_special_tokens=False).input_ids == ours.encode(text).tolist()


def test_line_ends_tabs_and_runs_of_spaces_are_learned(tmp_path):
    train_tokenizer([write_inputs(tmp_path)], tmp_path / "t", 450)
    tokenizer = Tokenizer.open(tmp_path / "t")
    for text in ("\n\n", "    ", "\t\t", ":\n"):
        assert tokenizer.encode(text).size == 1, text


def test_documents_with_the_signs_of_the_trainer_are_learned_from_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "\u2585\u2409 " + "wonderful words " * 30}) + "\n")
    train_tokenizer([path], tmp_path / "t", 285)
    assert Tokenizer.open(tmp_path / "t").encode("wonderful words").size < 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_bytes(tmp_path, kind):
    for name in ("one", "two"):
        train_tokenizer([write_inputs(tmp_path)], tmp_path / name, 450, kind, sample_bytes=8000, seed=3)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "tokenizer.json" in names and "tokenizer_config.json" in names
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0] == names


def test_of_a_long_text_a_sample_is_learned_drawn_by_the_seed(tmp_path):
    path = write_inputs(tmp_path)
    reports = [
        train_tokenizer([path], tmp_path / f"t{seed}", 400, "byte-bpe", sample_bytes=6000, seed=seed) for seed in (1, 2)
    ]
    for report in reports:
        assert report.num_documents == 40
        assert 0 < report.sampled_documents < 40
        assert report.sampled_bytes <= 6000 < report.num_bytes
    assert (tmp_path / "t1" / "tokenizer.json").read_bytes() != (tmp_path / "t2" / "tokenizer.json").read_bytes()


def test_a_document_longer_than_the_sample_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(("é" + PROSE) * 100)
    report = train_tokenizer([path], tmp_path / "t", 280, "byte-bpe", sample_bytes=1002)
    assert (report.sampled_documents, report.sampled_bytes) == (1, 1002)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("sentencepiece", 60_000, r"a vocabulary of 60,000 is too large for this text, .*--vocab-size \d+ or less"),
        ("byte-bpe", 60_000, r"a vocabulary of 60,000 is too large for this text, .*--vocab-size \d+ or less"),
        ("sentencepiece", 100, r"a vocabulary of 100 is too small .* use --vocab-size \d+ or more"),
        ("byte-bpe", 100, r"a vocabulary of 100 is too small .* use --vocab-size 257 or more"),
        ("wordpiece", 400, r"kind = 'wordpiece'; known: sentencepiece, byte-bpe"),
    ],
)
def test_a_size_or_kind_that_cannot_be_is_refused_and_nothing_is_left(tmp_path, kind, size, message):
    path = write_inputs(tmp_path)
    with pytest.raises(Fault, match=message):
        train_tokenizer([path], tmp_path / "t", size, kind)
    assert list(tmp_path.iterdir()) == [path]


def test_the_sizes_named_in_a_refusal_are_the_true_limits(tmp_path):
    path = write_inputs(tmp_path)
    for size in (60_000, 100):
        with pytest.raises(Fault) as caught:
            train_tokenizer([path], tmp_path / "t", size)
        limit = int(str(caught.value).split("--vocab-size ")[1].split()[0])
        train_tokenizer([path], tmp_path / f"t{size}", limit)
        assert Tokenizer.open(tmp_path / f"t{size}").vocabulary_size == limit


def test_text_without_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(Fault, match=r"no document with text in .*a\.jsonl; a tokenizer is learned from text"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "t", 300)


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").write_text("x")
    with pytest.raises(Fault, match=r"t is there already; choose another --output or remove it"):
        train_tokenizer([write_inputs(tmp_path)], tmp_path / "t", 450)


def test_faulty_lines_are_skipped_when_asked(tmp_path, caplog):
    path = write_inputs(tmp_path)
    path.write_text("{broken\n" + path.read_text())
    with caplog.at_level(logging.WARNING):
        report = train_tokenizer([path], tmp_path / "t", 450, on_error="skip")
    assert report.num_documents == 40
    assert "1 broken JSON" in caplog.text
