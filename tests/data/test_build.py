"""A corpus is built whole or not at all, in the order of the input, the same for any number of workers."""

from __future__ import annotations

import errno
import filecmp
import functools
import gzip
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare import build as building
from cpt.data.prepare import build_progress, checked_encoder, encoding
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.tokenizers import Tokenizer

END, BEGIN = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer with a token for each byte, an end (256) and a beginning (257) of a document."""
    return write_tokenizer(tmp_path_factory.mktemp("bytes"), eos_token="<end>", bos_token="<begin>")


def write_tokenizer(folder: Path, **config) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<begin>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abc é漢\n", k=generator.randint(1, 40))) for _ in range(count)]


def texts_in(corpus_folder: Path, tokenizer: Path) -> list[str]:
    """The documents of a corpus as text, each checked to end as it should."""
    corpus, opened = Corpus.open(corpus_folder), Tokenizer.open(tokenizer)
    texts = []
    for index in range(corpus.num_shards):
        shard = corpus.shard(index)
        for number in range(shard.num_documents):
            ids = shard.document(number)
            assert ids[-1] == END
            texts.append(opened.decode(ids[:-1]))
    return texts


def test_a_corpus_holds_the_documents_in_order_each_with_its_end(tmp_path, tokenizer):
    texts = random_texts(50)
    report = build_corpus([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "prose")
    assert texts_in(tmp_path / "prose", tokenizer) == texts
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (report.num_documents, report.num_tokens, report.num_bytes) == (50, num_bytes + 50, num_bytes)
    corpus = Corpus.open(tmp_path / "prose")
    assert (corpus.num_documents, corpus.num_tokens, corpus.num_bytes) == (50, num_bytes + 50, num_bytes)
    assert (corpus.vocabulary_size, corpus.end_of_document, corpus.manifest.begin_of_document) == (258, END, None)
    assert corpus.manifest.inputs == (f"{tmp_path}/a.jsonl",)
    assert report.held_out is None


def test_the_tokenizer_is_kept_in_the_corpus_byte_for_byte(tmp_path, tokenizer):
    build_corpus([write_jsonl(tmp_path / "a.jsonl", ["x"])], tokenizer, tmp_path / "prose")
    corpus = Corpus.open(tmp_path / "prose")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(corpus.tokenizer, tokenizer, names, shallow=False)[0] == names
    assert corpus.tokenizer_hash == Tokenizer.open(tokenizer).hash


def test_ends_and_beginnings_are_put_as_asked(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab"])
    build_corpus([path], tokenizer, tmp_path / "both", prepend_bos=True)
    build_corpus([path], tokenizer, tmp_path / "none", append_eos=False)
    assert Corpus.open(tmp_path / "both").read(0, 4).tolist()[::3] == [BEGIN, END]
    assert Corpus.open(tmp_path / "both").manifest.begin_of_document == BEGIN
    none = Corpus.open(tmp_path / "none")
    assert (none.num_tokens, none.end_of_document) == (2, None)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 100)
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(300))
    for workers in (1, 3):
        build_corpus([path], tokenizer, tmp_path / f"w{workers}", workers=workers, holdout=0.2, shard_tokens=700)
    for ending in ("", "-held-out"):
        one, three = tmp_path / f"w1{ending}", tmp_path / f"w3{ending}"
        names = sorted(path.name for path in one.iterdir() if path.is_file())
        assert "corpus.json" in names and "shard-00001.bin" in names
        assert filecmp.cmpfiles(one, three, names, shallow=False)[0] == names


def test_shards_roll_over_and_only_a_long_document_makes_a_longer_one(tmp_path, tokenizer):
    texts = ["a" * 9, "b" * 9, "c" * 10, "d" * 50, "e" * 5]
    report = build_corpus([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "c", shard_tokens=20)
    corpus = Corpus.open(tmp_path / "c")
    assert [corpus.shard(index).num_tokens for index in range(corpus.num_shards)] == [20, 11, 51, 6]
    assert report.num_shards == 4
    assert texts_in(tmp_path / "c", tokenizer) == texts


def test_a_held_out_document_stays_held_out_whatever_comes_beside_it(tmp_path, tokenizer):
    texts = random_texts(400)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", random_texts(200, seed=1) + texts[::-1])
    report = build_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "a", holdout=0.25)
    build_corpus([tmp_path / "b.jsonl"], tokenizer, tmp_path / "b", holdout=0.25)
    held_out = texts_in(tmp_path / "a-held-out", tokenizer)
    assert sorted(held_out + texts_in(tmp_path / "a", tokenizer)) == sorted(texts)
    assert set(held_out) <= set(texts_in(tmp_path / "b-held-out", tokenizer))
    # Binomial with 400 draws: five standard deviations.
    assert 56 < len(held_out) < 144
    assert report.held_out.num_documents == len(held_out)
    assert report.num_documents == 400 - len(held_out)


def test_a_smaller_share_holds_out_some_of_the_same_documents(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(400))
    for percent in (10, 30):
        build_corpus([path], tokenizer, tmp_path / f"c{percent}", holdout=percent / 100)
    held_out = [set(texts_in(tmp_path / f"c{percent}-held-out", tokenizer)) for percent in (10, 30)]
    assert held_out[0] < held_out[1]


def test_skipped_documents_are_reported_by_cause(tmp_path, tokenizer, monkeypatch, caplog):
    encode = Tokenizer.open(tokenizer).__class__.encode
    nothing = np.empty(0, np.int32)
    monkeypatch.setattr(
        "cpt.data.prepare.tokenizers._JsonTokenizer.encode",
        lambda self, text: nothing if text == "\u200b" else encode(self, text),
    )
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", "\u200b", "two"])
    path.write_text(path.read_text() + "{broken\n")
    with caplog.at_level(logging.WARNING):
        report = build_corpus([path], tokenizer, tmp_path / "c", on_error="skip")
    assert report.skipped == {"empty document": 1, "document without tokens": 1, "broken JSON": 1}
    assert texts_in(tmp_path / "c", tokenizer) == ["one", "two"]
    assert caplog.messages[-1] == "skipped in the input: 1 broken JSON, 1 empty document"


def test_a_build_that_a_damaged_compressed_file_stopped_goes_on_without_any_of_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(building, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    texts = random_texts(3000)
    good = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    content = bytearray(gzip.compress(write_jsonl(tmp_path / "x", texts).read_bytes()))
    content[len(content) // 2] ^= 1
    (tmp_path / "b.jsonl.gz").write_bytes(content)
    inputs = [good, tmp_path / "b.jsonl.gz"]
    with pytest.raises(Fault, match=r"cannot read .*b\.jsonl\.gz to its end"):
        build_corpus(inputs, tokenizer, tmp_path / "c")
    assert (tmp_path / "c.partial" / "journal.json").exists()
    for output in ("c", "at-once"):
        assert build_corpus(inputs, tokenizer, tmp_path / output, on_error="skip").skipped == {"damaged file": 1}
        assert texts_in(tmp_path / output, tokenizer) == texts[:50]
    names = ["corpus.json", "shard-00000.bin", "shard-00000.idx"]
    assert filecmp.cmpfiles(tmp_path / "c", tmp_path / "at-once", names, shallow=False)[0] == names


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_in_the_input_leaves_nothing_behind(tmp_path, tokenizer, workers, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 10)
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(20))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(Fault, match=r"a\.jsonl:21: broken JSON"):
        build_corpus([path], tokenizer, tmp_path / "c", workers=workers, holdout=0.3)
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(20))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "refuse_empty", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_corpus([path], tokenizer, tmp_path / "c")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("used", ["c", "c-held-out"])
def test_a_used_output_is_refused_and_left_as_it_is(tmp_path, tokenizer, used):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(20))
    (tmp_path / used).mkdir()
    (tmp_path / used / "mine").write_text("x")
    with pytest.raises(Fault, match=rf"{used} is there already; choose another --output or remove it"):
        build_corpus([path], tokenizer, tmp_path / "c", holdout=0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", used]
    assert (tmp_path / used / "mine").read_text() == "x"


def test_folders_above_the_output_are_made_and_an_empty_one_is_used(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    for output in ("deep/er/c", "empty"):
        build_corpus([path], tokenizer, tmp_path / output)
        assert Corpus.open(tmp_path / output).num_tokens == 2


def test_a_full_disk_before_the_first_checkpoint_is_told_and_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", random_texts(20))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cpt.data.prepare.spool.Spool.flush", full)
    with pytest.raises(OSError, match="the disk is full; free some space, then choose another --output"):
        build_corpus([path], tokenizer, tmp_path / "c")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="sets a limit of the system")
def test_a_file_that_grows_too_large_is_told_with_its_path(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 300] * 500)
    words = ["data", "build", str(path), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "c")]
    script = f"""
import resource, signal, sys
from cpt import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.main({words!r}))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"cpt data: {tmp_path}/c.partial: a file would grow larger than the file system or a limit (ulimit -f) allows; "
        "raise the limit, then choose another --output"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, r"holdout = 1\.0 is no share of documents; use 0 for none, or for example 0\.05"),
        ({"holdout": -0.1}, r"holdout = -0\.1 is no share"),
        ({"workers": 0}, "workers = 0; at least 1 process must tokenize"),
        ({"holdout": 1e-9}, r"of 3 documents, none is held out at --holdout 0\.00%; use another share"),
        ({"holdout": 1 - 1e-9}, r"of 3 documents, none is left to train on at --holdout 100\.00%"),
        ({"on_error": "ignore"}, "on_error = 'ignore'; known: skip, stop"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, tokenizer, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(Fault, match=message):
        build_corpus([path], tokenizer, tmp_path / "c", **options)
    assert list(tmp_path.iterdir()) == [path]


def test_input_without_documents_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(Fault, match=r"no document with text in .*a\.jsonl; a corpus is made of text"):
        build_corpus([path], tokenizer, tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has no eos_token; name one in its tokenizer_config\.json, or build with --no-append-eos"),
        ({"append_eos": False, "prepend_bos": True}, "has no bos_token; .* or build without --prepend-bos"),
    ],
)
def test_a_tokenizer_without_the_ids_asked_for_is_refused(tmp_path, options, message):
    (tmp_path / "t").mkdir()
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(Fault, match=message):
        build_corpus([path], write_tokenizer(tmp_path / "t"), tmp_path / "c", **options)


class EngineWithAFault:
    """Gives the ids of the tokenizers library, but wrong ones for a text with a z."""

    def __init__(self, reference: tokenizers.Tokenizer) -> None:
        self._reference = reference

    def encode(self, text: str) -> np.ndarray:
        ids = np.array(self._reference.encode(text).ids, dtype=np.int32)
        return ids[::-1] if "z" in text else ids


def test_the_fast_engine_is_checked_on_every_input_file(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(checked_encoder, "VERIFIED_CHARACTERS", 4)
    monkeypatch.setattr(checked_encoder, "VERIFIED_OF_EACH_INPUT", 8)
    monkeypatch.setattr(checked_encoder, "text_of_traps", lambda added: "no traps")
    build_engine = functools.partial(checked_encoder.CheckedEncoder, build_engine=EngineWithAFault)
    monkeypatch.setattr("cpt.data.prepare.tokenizers.CheckedEncoder", build_engine)
    first = write_jsonl(tmp_path / "a.jsonl", ["a text without it"] * 3)
    second = write_jsonl(tmp_path / "b.jsonl", ["a fizz", "a buzz"])
    build_corpus([first, second], tokenizer, tmp_path / "c")
    assert texts_in(tmp_path / "c", tokenizer) == ["a text without it"] * 3 + ["a fizz", "a buzz"]
    assert "tiktoken gives other ids than tokenizers at character 0 of the text 'a fizz'" in caplog.text


def test_a_worker_that_dies_is_told(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    # What the worker is given to do ends it at once, as the kernel does for want of memory.
    monkeypatch.setattr(encoding, "_encode_in_worker", eval)
    deadly = SimpleNamespace(texts="__import__('os')._exit(1)", inputs={})
    monkeypatch.setattr(building, "_batches", lambda *_: iter([deadly]))
    with pytest.raises(Fault, match="one of 2 worker processes died, most often for want of memory; use fewer --work"):
        build_corpus([path], tokenizer, tmp_path / "c", workers=2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path, tokenizer):
    script = f"""
import multiprocessing, time
from types import SimpleNamespace
from cpt.data.prepare.encoding import Recipe, encode_batches
recipe = Recipe({str(tokenizer)!r}, None, None, 0.0)
def batches():
    yield from [SimpleNamespace(texts=["a"], inputs=[0])] * 6
    time.sleep(60)
encoded = encode_batches(batches(), recipe, 2)
next(encoded)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
next(encoded)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_running, workers))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_without_a_terminal_progress_is_told_in_lines(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(build_progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        build_corpus([write_jsonl(tmp_path / "a.jsonl", ["one"])], tokenizer, tmp_path / "c", progress=True)
    assert any(message.startswith("c: 1 document, 4 tokens, ") for message in caplog.messages)
