"""Verifying a corpus finds every kind of damage, and none in a sound one."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from cpt.config import Fault
from cpt.data.prepare import verify as verifying
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.train_tokenizer import train_tokenizer
from cpt.data.prepare.verify import verify_corpus
from cpt.data.shards import ShardWriter

TEXTS = ["the cat sat on the mat", "a dog and a cat ran home", "where did the dog sit"] * 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([folder / "a.jsonl"], folder / "tokenizer", 290)
    build_corpus([folder / "a.jsonl"], folder / "tokenizer", folder / "prose", shard_tokens=100)
    return folder / "prose"


@pytest.fixture
def corpus(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "prose"))


def change_manifest(folder: Path, **changes) -> None:
    path = folder / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def accept_checksums(folder: Path) -> None:
    """Makes the manifest agree with the bytes, so that only what they mean can be wrong."""
    content = json.loads((folder / "corpus.json").read_text())
    for entry in content["shards"]:
        for ending in ("bin", "idx"):
            entry[f"{ending}_xxh64"] = verifying._checksum(folder / f"{entry['name']}.{ending}")
    (folder / "corpus.json").write_text(json.dumps(content))


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_a_sound_corpus_has_no_damage(sound, monkeypatch):
    monkeypatch.setattr(verifying, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(verifying, "BYTES_AT_ONCE", 11)
    assert verify_corpus(sound) == []


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_one_changed_bit_is_found(corpus, ending):
    path = corpus / f"shard-00001.{ending}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    damage = verify_corpus(corpus)
    assert any(f"shard-00001.{ending} has checksum" in line and "its bytes were changed" in line for line in damage)


def test_missing_and_cut_files_are_all_found(corpus):
    (corpus / "shard-00000.idx").unlink()
    (corpus / "shard-00001.bin").write_bytes(b"12")
    damage = verify_corpus(corpus)
    assert len(damage) == 2
    assert "shard-00000.idx is missing" in damage[0]
    assert "shard-00001.bin has 2 bytes" in damage[1]


def test_ids_outside_the_vocabulary_are_found(corpus):
    overwrite(corpus / "shard-00000.bin", 0, struct.pack("<2H", 290, 999))
    accept_checksums(corpus)
    (damage,) = verify_corpus(corpus)
    assert damage.endswith("shard-00000.bin has 2 token ids outside the vocabulary of 290, from 0 to 999")


def test_documents_without_their_end_are_found(corpus):
    change_manifest(corpus, end_of_document=7)
    damage = verify_corpus(corpus)
    assert "documents that do not end in token 7, the end of a document by the manifest" in damage[0]
    count = sum(int(line.split(" has ")[1].split()[0]) for line in damage)
    assert count == len(TEXTS)


def test_empty_documents_are_found(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        for document in ([1, 2], [], [3], []):
            writer.add_document(np.array(document, np.int32))
    assert verify_corpus(tmp_path / "web") == [f"{tmp_path}/web has 2 empty documents"]


def test_negative_ids_of_a_bare_prefix_are_found(tmp_path):
    with ShardWriter(tmp_path / "web", 70_000) as writer:
        writer.add_document(np.arange(5))
    assert verify_corpus(tmp_path / "web.idx") == []
    overwrite(tmp_path / "web.bin", 4, struct.pack("<i", -3))
    assert verify_corpus(tmp_path / "web") == [f"{tmp_path}/web.bin has 1 token ids below 0, from -3 to 4"]


@pytest.mark.parametrize(
    ("position", "content"),
    [
        (34, struct.pack("<2i", 3, 1)),  # lengths swapped
        (34, struct.pack("<2i", -1, 5)),  # a negative length
        (34 + 12, struct.pack("<q", 2)),  # the first offset
        (34 + 36, struct.pack("<q", 1)),  # documents that do not begin at 0
        (34 + 36 + 8, struct.pack("<q", 2**40)),  # a document far outside
    ],
)
def test_an_index_that_contradicts_itself_is_found(tmp_path, position, content):
    with ShardWriter(tmp_path / "web", 500) as writer:
        for length in (1, 3, 2):
            writer.add_document(np.arange(length))
    overwrite(tmp_path / "web.idx", position, content)
    (damage,) = verify_corpus(tmp_path / "web")
    assert damage.endswith("web.idx: its lengths, offsets and documents contradict each other")


def test_counts_that_differ_from_the_manifest_are_found(corpus):
    content = json.loads((corpus / "corpus.json").read_text())
    for key in ("num_documents", "num_tokens"):
        content[key] += 1
        content["shards"][0][key] += 1
    (corpus / "corpus.json").write_text(json.dumps(content))
    damage = verify_corpus(corpus)
    assert len(damage) == 2
    assert "shard-00000: num_tokens is" in damage[0] and "where the manifest tells of" in damage[0]
    assert "shard-00000: num_documents is" in damage[1]


def test_another_tokenizer_is_found(corpus):
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    (damage,) = verify_corpus(corpus)
    assert "it is not the tokenizer that made the tokens" in damage


def test_a_missing_tokenizer_is_found(corpus):
    shutil.rmtree(corpus / "tokenizer")
    (damage,) = verify_corpus(corpus)
    assert "there is no tokenizer at" in damage


def test_a_broken_manifest_is_damage(corpus):
    (corpus / "corpus.json").write_text("{")
    (damage,) = verify_corpus(corpus)
    assert "corpus.json is not JSON" in damage


def test_a_cut_file_of_a_bare_prefix_is_damage(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.arange(5))
    (tmp_path / "web.bin").write_bytes(b"12")
    (damage,) = verify_corpus(tmp_path / "web")
    assert "web.bin is cut short" in damage


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(Fault, match="there is no corpus at"):
        verify_corpus(tmp_path / "gone")
    with pytest.raises(Fault, match="is no corpus"):
        verify_corpus(tmp_path)
