"""The data commands say in a line what they did, and end with 1 on damage."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re

import pytest

from cpt.cli import data
from cpt.config import Fault
from cpt.data.corpus import Corpus

TEXTS = ["the cat sat on the mat", "a dog and a cat ran home", "where did the dog sit"] * 20


def run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="cpt data")
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"{number} {text}"}) + "\n" for number, text in enumerate(TEXTS)))
    return path


@pytest.fixture
def tokenizer(tmp_path, text):
    run("tokenizer", text, "--output", tmp_path / "t", "--vocab-size", 300, "--text-key", "body")
    return tmp_path / "t"


def test_text_goes_to_a_verified_corpus_in_three_commands(tmp_path, text, capsys):
    num_bytes = sum(len(f"{number} {text}") for number, text in enumerate(TEXTS))
    options = ("--text-key", "body")
    assert run("tokenizer", text, "--output", tmp_path / "t", "--vocab-size", 300, *options) == 0
    assert capsys.readouterr().out == (
        f"trained {tmp_path}/t: sentencepiece, 300 entries, from 60 documents, {num_bytes / 1000:.1f} kB of text\n"
    )
    assert run("build", text, "--tokenizer", tmp_path / "t", "--output", tmp_path / "c", *options) == 0
    num_tokens = Corpus.open(tmp_path / "c").num_tokens
    assert capsys.readouterr().out == (
        f"built {tmp_path}/c: 60 documents, {num_tokens:,} tokens, {num_bytes / 1000:.1f} kB of text, "
        f"{num_bytes / num_tokens:.2f} bytes a token\n"
    )
    assert run("verify", tmp_path / "c") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{num_tokens:,} tokens in 60 documents, 0 of them empty"
    assert lines[3:] == [
        "documents that end in token 2, the end of a document: 100.00%",
        f"tokenizer of the manifest: {Corpus.open(tmp_path / 'c').tokenizer_hash}",
        f"{tmp_path}/c: no damage found",
    ]


def test_a_sampled_text_is_told_as_such(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(data, "train_tokenizer", functools.partial(data.train_tokenizer, sample_bytes=700))
    run("tokenizer", text, "--output", tmp_path / "t", "--vocab-size", 270, "--kind", "byte-bpe", "--text-key", "body")
    out = capsys.readouterr().out
    assert re.search(r"byte-bpe, 270 entries, from a sample of [67]\d\d bytes of 60 documents, 1\.\d kB of text", out)


def test_a_held_out_share_and_skipped_lines_are_told(tmp_path, text, tokenizer, capsys):
    text.write_text(text.read_text() + "{broken\n")
    capsys.readouterr()
    options = ("--holdout", "20%", "--on-error", "skip", "--text-key", "body", "--prepend-bos", "--no-append-eos")
    assert run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--workers", 1, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"built {tmp_path}/c: ")
    assert lines[1].startswith(f"built {tmp_path}/c-held-out: ")
    assert lines[2] == "skipped 1: broken JSON"
    corpus = Corpus.open(tmp_path / "c")
    assert (corpus.end_of_document, corpus.manifest.begin_of_document) == (None, 1)


def test_a_corpus_a_domain_is_told_in_a_line_each(tmp_path, text, tokenizer, capsys):
    lines = [json.loads(line) for line in text.read_text().splitlines()]
    kinds = ["prose", "code"]
    text.write_text(
        "".join(json.dumps({**line, "kind": kinds[i % 2], "key": i}) + "\n" for i, line in enumerate(lines))
    )
    capsys.readouterr()
    keys = ("--text-key", "body", "--domain-key", "kind", "--id-key", "key")
    words = ("--tokenizer", tokenizer, "--output", tmp_path / "c", "--shuffle-documents", 3, "--restart", *keys)
    assert run("build", text, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" documents")[0] for line in lines] == [
        f"built {tmp_path}/c/code: 30",
        f"built {tmp_path}/c/prose: 30",
    ]


def test_inspect_shows_counts_and_texts(tmp_path, text, tokenizer, capsys):
    run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--text-key", "body")
    capsys.readouterr()
    assert run("inspect", tmp_path / "c") == 0
    out = capsys.readouterr().out
    assert out.startswith("c: 60 documents, ")
    assert "tokens in 1 shard of uint16" in out
    assert "tokens a document, by percentile: 0 % " in out
    assert re.search(r"looked at: unknown tokens 0\.0000%, byte-fallback tokens \d+\.\d{4}%, ends of documents ", out)
    assert re.search(r"--- document 0, \d+ tokens, unknown tokens 0\.0000%, byte-fallback tokens \d+\.\d{4}% ---", out)
    assert "0 the cat sat on the mat[end of document]" in out


def test_inspect_of_a_bare_prefix_says_why_it_shows_no_texts(tmp_path, text, tokenizer, capsys):
    run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--text-key", "body")
    capsys.readouterr()
    assert run("inspect", tmp_path / "c" / "shard-00000") == 0
    assert (
        "no manifest: the tokenizer is not known, so no sample texts; name one with --tokenizer"
        in capsys.readouterr().out
    )
    assert run("inspect", tmp_path / "c" / "shard-00000", "--tokenizer", tokenizer) == 0
    assert "0 the cat sat on the mat" in capsys.readouterr().out
    assert run("verify", tmp_path / "c" / "shard-00000", "--vocabulary", 3) == 1
    assert "outside the vocabulary of 3" in capsys.readouterr().out


def test_pack_tells_bins_padding_and_what_is_cut(tmp_path, text, tokenizer, capsys):
    run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--text-key", "body")
    capsys.readouterr()
    assert run("pack", tmp_path / "c", "--sequence-length", 40, "--output", tmp_path / "p", "--seed", 3) == 0
    first, second = capsys.readouterr().out.splitlines()
    corpus = Corpus.open(tmp_path / "p")
    assert (
        first == f"packed {tmp_path}/p: {corpus.num_windows(40)} bins of 40 tokens, "
        f"{corpus.num_padding / corpus.num_tokens:.2%} padding"
    )
    assert re.fullmatch(
        r"documents cut: 0 of 60 \(0\.00%\), each longer than a bin; "
        r"unpacked, windows of 40 tokens cut \d+ \(\d+\.\d\d%\)",
        second,
    )
    run("inspect", tmp_path / "p")
    assert "packed into bins of 40 tokens, " in capsys.readouterr().out


def test_the_engine_can_be_forced_and_the_one_that_serves_is_told_once(tmp_path, text, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    for engine in ("auto", "huggingface"):
        words = ("--tokenizer", tokenizer, "--output", tmp_path / engine, "--text-key", "body", "--engine", engine)
        assert run("build", text, *words) == 0
    told = [message for message in caplog.messages if "tokenizing with" in message]
    assert len(told) == 2
    assert told[1] == "tokenizing with the package tokenizers; tiktoken is faster, but it was not asked for"
    assert (tmp_path / "auto" / "corpus.json").read_bytes() == (tmp_path / "huggingface" / "corpus.json").read_bytes()


def test_verify_lists_damage_and_ends_with_1(tmp_path, text, tokenizer, capsys):
    run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--text-key", "body")
    capsys.readouterr()
    (tmp_path / "c" / "shard-00000.bin").unlink()
    assert run("verify", tmp_path / "c") == 1
    *_, damage, summary = capsys.readouterr().out.splitlines()
    assert "shard-00000.bin is missing" in damage
    assert summary == f"{tmp_path}/c: 1 fault found"


def test_mistakes_of_the_user_are_faults(tmp_path, text):
    with pytest.raises(Fault, match="there is no tokenizer at"):
        run("build", text, "--tokenizer", tmp_path / "gone", "--output", tmp_path / "c")
    with pytest.raises(Fault, match="there is no corpus at"):
        run("verify", tmp_path / "gone")


@pytest.mark.parametrize("share", ["5", "x", "100%", "-1%"])
def test_a_share_that_is_none_is_refused_with_an_example(tmp_path, share, capsys):
    with pytest.raises(SystemExit) as ended:
        run("build", "a.jsonl", "--tokenizer", "t", "--output", "c", f"--holdout={share}")
    assert ended.value.code == 2
    assert f"'{share}' is no share of documents; write 5% or 0.05" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokenizer", "build", "pack", "inspect", "verify"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    assert f"example: cpt data {command} " in capsys.readouterr().out


def test_one_document_is_told_as_one(tmp_path, text, tokenizer, capsys):
    text.write_text(text.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    run("build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c", "--text-key", "body")
    run("inspect", tmp_path / "c")
    run("verify", tmp_path / "c")
    out = capsys.readouterr().out
    assert out.count("1 document, ") == 3
    assert "1 documents" not in out


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1234, "1.2 kB"), (5_600_000, "5.6 MB"), (10**13, "10.0 TB")],
)
def test_sizes_are_written_for_the_eye(size, shown):
    assert data._size(size) == shown
