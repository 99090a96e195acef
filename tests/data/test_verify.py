"""Verifying a corpus finds every kind of damage, and none in a sound one."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from cpt.config import Fault
from cpt.data.prepare import sound_index
from cpt.data.prepare import verify as verifying
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.pack import pack_corpus
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
    assert verify_corpus(sound).damage == ()


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_one_changed_bit_is_found(corpus, ending):
    path = corpus / f"shard-00001.{ending}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    damage = verify_corpus(corpus).damage
    assert any(f"shard-00001.{ending} has checksum" in line and "its bytes were changed" in line for line in damage)


def test_missing_and_cut_files_are_all_found(corpus):
    (corpus / "shard-00000.idx").unlink()
    (corpus / "shard-00001.bin").write_bytes(b"12")
    damage = verify_corpus(corpus).damage
    assert len(damage) == 2
    assert "shard-00000.idx is missing" in damage[0]
    assert "shard-00001.bin has 2 bytes" in damage[1]


def test_ids_outside_the_vocabulary_are_found(corpus):
    overwrite(corpus / "shard-00000.bin", 0, struct.pack("<2H", 290, 999))
    accept_checksums(corpus)
    (damage,) = verify_corpus(corpus).damage
    assert damage.endswith("shard-00000.bin has 2 token ids outside the vocabulary of 290, from 2 to 999")


def test_documents_without_their_end_are_found(corpus):
    change_manifest(corpus, end_of_document=7)
    damage = verify_corpus(corpus).damage
    assert "documents that do not end in token 7, the end of a document by the manifest" in damage[0]
    count = sum(int(line.split(" has ")[1].split()[0]) for line in damage)
    assert count == len(TEXTS)


def test_facts_are_told_of_a_sound_corpus(sound):
    content = json.loads((sound / "corpus.json").read_text())
    found = verify_corpus(sound).facts
    num_shards = len(content["shards"])
    assert found[0] == f"{num_shards} shards, {2 * num_shards} checksums compared"
    assert found[1] == f"{content['num_tokens']:,} tokens in 15 documents, 0 of them empty"
    assert re.fullmatch(r"token ids from 2 to \d+; size of the vocabulary: 290", found[2])
    assert found[3] == "documents that end in token 2, the end of a document: 100.00%"
    assert found[4] == f"tokenizer of the manifest: {content['tokenizer_hash']}"


def test_empty_documents_are_counted_and_no_damage(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        for document in ([1, 2], [], [3], [5, 2], []):
            writer.add_document(np.array(document, np.int32))
    found = verify_corpus(tmp_path / "web")
    assert found.damage == ()
    assert found.facts == (
        "5 tokens in 5 documents, 2 of them empty",
        "token ids from 1 to 5; size of the vocabulary: not known, but it must be above 5; --vocabulary checks it",
        "documents that end in token 2, the commonest last one, as no end is known: 66.67%",
    )


def test_a_corpus_without_tokens_can_be_verified(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.array([], np.int32))
    found = verify_corpus(tmp_path / "web")
    assert found.damage == ()
    assert found.facts == (
        "0 tokens in 1 document, 1 of them empty",
        "no token ids; size of the vocabulary: not known",
    )


def test_ids_of_a_bare_prefix_are_held_against_a_vocabulary_that_is_named(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.arange(10))
    assert verify_corpus(tmp_path / "web", 10).damage == ()
    (damage,) = verify_corpus(tmp_path / "web", 8).damage
    assert damage.endswith("web.bin has 2 token ids outside the vocabulary of 8, from 0 to 9")


def test_a_packed_corpus_may_hold_pieces_that_do_not_end(tmp_path, corpus):
    pack_corpus(corpus, 8, tmp_path / "packed")
    found = verify_corpus(tmp_path / "packed")
    assert found.damage == ()
    num_padding = json.loads((tmp_path / "packed" / "corpus.json").read_text())["num_padding"]
    assert found.facts[4].startswith(f"packed into bins of 8 tokens, {num_padding} tokens of padding; ")
    share = float(found.facts[3].rpartition(" ")[2].rstrip("%"))
    assert 0 < share < 100


def test_raw_streams_are_verified(tmp_path):
    np.array([5, 6, 0, 7, 0, 9], np.uint16).tofile(tmp_path / "part-0.npy")
    np.array([8, 0], np.uint16).tofile(tmp_path / "part-1.npy")
    found = verify_corpus(f"{tmp_path}/part-*.npy:uint16:end=0", 9)
    assert found.damage == (f"{tmp_path}/part-0.npy has 1 token id outside the vocabulary of 9, from 0 to 9",)
    assert found.facts == (
        "8 tokens in 4 documents, 0 of them empty",
        "token ids from 0 to 9; size of the vocabulary: 9",
        "documents that end in token 0, the end of a document: 75.00%",
    )
    (tmp_path / "part-1.npy").write_bytes(b"123")
    (damage,) = verify_corpus(f"{tmp_path}/part-*.npy:uint16").damage
    assert "part-1.npy has 3 bytes, no whole number of uint16 tokens" in damage


def write_datatrove(folder: Path, ends: list[int], num_tokens: int = 6) -> Path:
    np.arange(num_tokens, dtype=np.uint16).tofile(folder / "a.ds")
    np.array(ends, dtype=np.uint64).tofile(folder / "a.ds.index")
    (folder / "a.ds.metadata").write_text(f"gpt2|2\n{num_tokens}\n")
    return folder / "a.ds"


def test_datatrove_files_are_verified(tmp_path):
    found = verify_corpus(write_datatrove(tmp_path, [0, 2, 2, 6]))
    assert (found.damage, found.facts[0]) == ((), "6 tokens in 4 documents, 2 of them empty")
    (damage,) = verify_corpus(write_datatrove(tmp_path, [4, 2, 6])).damage
    assert damage.endswith("a.ds: the ends of its documents are not in order or lie outside")
    (damage,) = verify_corpus(write_datatrove(tmp_path, [2, 5])).damage
    assert "a.ds.index does not end at the 6 tokens" in damage


def test_metadata_that_is_no_text_is_damage(tmp_path):
    path = write_datatrove(tmp_path, [2, 6])
    (tmp_path / "a.ds.metadata").write_bytes(b"gpt2\xff|2\n6\n")
    (damage,) = verify_corpus(path).damage
    assert "a.ds.metadata is not as datatrove writes it: TOKENIZER|BYTES in its first line" in damage


def test_ids_that_no_model_has_are_damage_without_a_vocabulary(tmp_path):
    np.array([5, 2**31 - 1, 2**31, 2**32 - 1], np.uint32).tofile(tmp_path / "a.npy")
    found = verify_corpus(f"{tmp_path}/a.npy:uint32")
    assert found.facts[1].startswith("token ids from 5 to 4,294,967,295; size of the vocabulary: not known")
    assert found.damage == (
        f"{tmp_path}/a.npy has 2 token ids from 2,147,483,648 on, which no model has, from 5 to 4294967295",
    )


def test_of_a_folder_of_corpora_one_is_to_be_named(corpus):
    with pytest.raises(Fault, match=r"is no corpus but holds some: prose; name one of them, such as .*/prose"):
        verify_corpus(corpus.parent)


def test_split_files_are_verified(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        for length in (3, 0, 4, 2):
            writer.add_document(np.arange(length))
    tokens = (tmp_path / "web.bin").read_bytes()
    (tmp_path / "web.bin").unlink()
    for number, part in enumerate((tokens[:10], tokens[10:])):
        (tmp_path / f"web-0000{number}-of-00002.bin").write_bytes(part)
    found = verify_corpus(tmp_path / "web", 3)
    # The one that the end of a part cuts counts in both.
    assert found.facts[0] == "9 tokens in 5 documents, 1 of them empty"
    assert found.damage == (
        f"{tmp_path}/web-00001-of-00002.bin has 1 token id outside the vocabulary of 3, from 0 to 3",
    )
    overwrite(tmp_path / "web.idx", 34, struct.pack("<4i", 4, 0, 3, 2))
    (damage,) = verify_corpus(tmp_path / "web").damage
    assert damage.endswith("web.idx: its lengths, offsets and documents contradict each other")
    (tmp_path / "web-00001-of-00002.bin").write_bytes(b"12")
    (damage,) = verify_corpus(tmp_path / "web").damage
    assert "is cut short" in damage


def test_raw_files_that_are_not_there_or_not_named_in_full_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"12")
    for name, message in (
        ("b*.npy:uint16", "no files match"),
        ("a.npy", "does not say of which type"),
        ("c.ds", "is mi"),
    ):
        with pytest.raises(Fault, match=message):
            verify_corpus(tmp_path / name)


def test_negative_ids_of_a_bare_prefix_are_found(tmp_path):
    with ShardWriter(tmp_path / "web", 70_000) as writer:
        writer.add_document(np.arange(5))
    assert verify_corpus(tmp_path / "web.idx").damage == ()
    overwrite(tmp_path / "web.bin", 4, struct.pack("<i", -3))
    assert verify_corpus(tmp_path / "web").damage == (f"{tmp_path}/web.bin has 1 token id below 0, from -3 to 4",)


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
@pytest.mark.parametrize("entries_at_once", [1, 2, 100])
def test_an_index_that_contradicts_itself_is_found(tmp_path, position, content, entries_at_once, monkeypatch):
    monkeypatch.setattr(sound_index, "ENTRIES_AT_ONCE", entries_at_once)
    with ShardWriter(tmp_path / "web", 500) as writer:
        for length in (1, 3, 2):
            writer.add_document(np.arange(length))
    assert verify_corpus(tmp_path / "web").damage == ()
    overwrite(tmp_path / "web.idx", position, content)
    (damage,) = verify_corpus(tmp_path / "web").damage
    assert damage.endswith("web.idx: its lengths, offsets and documents contradict each other")


def test_counts_that_differ_from_the_manifest_are_found(corpus):
    content = json.loads((corpus / "corpus.json").read_text())
    for key in ("num_documents", "num_tokens"):
        content[key] += 1
        content["shards"][0][key] += 1
    (corpus / "corpus.json").write_text(json.dumps(content))
    damage = verify_corpus(corpus).damage
    assert len(damage) == 2
    assert "shard-00000: num_tokens is" in damage[0] and "where the manifest tells of" in damage[0]
    assert "shard-00000: num_documents is" in damage[1]


def test_another_tokenizer_is_found(corpus):
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    (damage,) = verify_corpus(corpus).damage
    assert "it is not the tokenizer that made the tokens" in damage


def test_a_missing_tokenizer_is_found(corpus):
    shutil.rmtree(corpus / "tokenizer")
    (damage,) = verify_corpus(corpus).damage
    assert "there is no tokenizer at" in damage


def test_a_broken_manifest_is_damage(corpus):
    (corpus / "corpus.json").write_text("{")
    (damage,) = verify_corpus(corpus).damage
    assert "corpus.json is not JSON" in damage


def test_a_cut_file_of_a_bare_prefix_is_damage(tmp_path):
    with ShardWriter(tmp_path / "web", 500) as writer:
        writer.add_document(np.arange(5))
    (tmp_path / "web.bin").write_bytes(b"12")
    (damage,) = verify_corpus(tmp_path / "web").damage
    assert "web.bin is cut short" in damage


def test_what_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(Fault, match="there is no corpus at"):
        verify_corpus(tmp_path / "gone")
    with pytest.raises(Fault, match="is no corpus: it has no corpus.json"):
        verify_corpus(tmp_path)
