"""Token files of other programs are corpora once their type is known, and what does not fit is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.prepare.inspect import inspect_corpus
from cpt.data.shards import Shard, ShardWriter


def lengths_of_documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.shard(index).document_lengths.tolist() for index in range(corpus.num_shards)]


def write_datatrove(folder: Path, name="pile.ds", dtype="H", first_line="gpt2|2", ends=(3, 5), count="5") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(struct.pack(f"<5{dtype}", 7, 8, 0, 9, 0))
    (folder / f"{name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    (folder / f"{name}.metadata").write_text(f"{first_line}\n{count}\n5 T")
    return folder / name


def write_split(folder: Path, cuts=(8, 14), total="00002", documents=((1, 2, 3, 4, 5), (6, 7), (8, 9, 10))) -> Path:
    """Pythia's way: 20 bytes of uint16 tokens cut at these bytes, numbered up to `total`."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / "document", 500) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    content = (folder / "document.bin").read_bytes()
    for number, (start, stop) in enumerate(zip((0, *cuts), (*cuts, len(content)), strict=True)):
        (folder / f"document-{number:05d}-of-{total}.bin").write_bytes(content[start:stop])
    return folder / "document"


@pytest.mark.parametrize(("type_name", "code"), [("uint16", "H"), ("uint32", "I"), ("int32", "i")])
def test_a_raw_stream_of_a_declared_type_is_a_corpus(tmp_path, type_name, code):
    (tmp_path / "part-0.npy").write_bytes(struct.pack(f"<6{code}", 1, 2, 0, 3, 60_000, 5))
    corpus = Corpus.open(f"{tmp_path}/part-0.npy:{type_name}")
    assert (corpus.num_tokens, corpus.num_documents, corpus.end_of_document) == (6, 1, None)
    assert corpus.windows(np.array([1, 0]), 2).tolist() == [[0, 3, 60_000], [1, 2, 0]]
    assert corpus.read(4, 6).tolist() == [60_000, 5]
    assert (corpus.vocabulary_size, corpus.tokenizer, corpus.num_bytes) == (None, None, None)
    assert Corpus.open(corpus.path).fingerprint == corpus.fingerprint


def test_the_token_that_ends_a_document_tells_documents_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("cpt.data.raw_streams.TOKENS_AT_ONCE", 4)
    (tmp_path / "a.npy").write_bytes(struct.pack("<9H", 1, 2, 0, 3, 0, 5, 6, 7, 0))
    (tmp_path / "b.npy").write_bytes(struct.pack("<3H", 0, 8, 9))
    corpus = Corpus.open(f"{tmp_path}/*.npy:uint16:end=0")
    assert lengths_of_documents(corpus) == [[3, 2, 4], [1, 2]]
    assert (corpus.num_documents, corpus.end_of_document) == (5, 0)
    assert corpus.shard(0).document(1).tolist() == [3, 0]
    with pytest.raises(ValueError, match="document 3 is not among the 3"):
        corpus.shard(0).document(3)
    inspection = inspect_corpus(corpus.path)
    assert (inspection.num_documents, inspection.end_rate) == (5, 4 / 12)


def test_files_of_a_glob_are_one_stream_in_the_order_of_their_names(tmp_path):
    for name, tokens in (("part-1.npy", (4, 5, 6)), ("part-0.npy", (1, 2, 3)), ("part-2.npy", ())):
        (tmp_path / name).write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    corpus = Corpus.open(f"{tmp_path}/part-*.npy:uint16")
    assert corpus.read(0, 6).tolist() == [1, 2, 3, 4, 5, 6]
    assert corpus.windows(np.array([0, 1]), 2).tolist() == [[1, 2, 3], [3, 4, 5]]


def test_the_fingerprint_of_raw_files_follows_type_size_and_beginning_not_the_place(tmp_path):
    for name, tokens in (("a", (1, 2, 3, 4)), ("b", (1, 2, 3, 4)), ("c", (1, 2, 3, 5)), ("d", (1, 2, 3, 4, 0, 0))):
        (tmp_path / name).write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    a, b, c, d = (Corpus.open(f"{tmp_path}/{name}:uint16").fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d, Corpus.open(f"{tmp_path}/a:uint32").fingerprint}) == 4


@pytest.mark.parametrize(
    ("name", "content", "path", "message"),
    [
        ("x.npy", b"1234", "x.npy", r"holds raw tokens and does not say of which type; name it, .*x\.npy:uint16 or"),
        ("x.npy", b"1234", "x.npy:float32", r"tokens are not stored as float32; known: uint16, uint32, int32"),
        ("x.npy", b"123", "x.npy:uint16", r"has 3 bytes, no whole number of uint16 tokens; it is damaged or of a"),
        ("x.npy", b"\x93NUMPY\x01\x00", "x.npy:uint16", r"is a NumPy file with a header, not raw tokens; write its"),
        ("x.npy", b"12", "x.npy:uint16:end=65536", r"uint16 holds no 65536; name the id of the token, or no end"),
        ("x.npy", b"12", "y.npy:uint16", r"cannot read .*y\.npy: No such file"),
        ("x.npy", b"12", "y-*.npy:uint16", r"no files match .*y-\*\.npy"),
    ],
)
def test_raw_files_that_do_not_fit_are_refused(tmp_path, name, content, path, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Fault, match=message):
        Corpus.open(tmp_path / path)


@pytest.mark.parametrize(("dtype", "first_line"), [("H", "gpt2|2"), ("I", "org/gpt|4"), ("H", "gpt2"), ("I", "gpt")])
def test_a_datatrove_file_knows_its_type_and_documents(tmp_path, dtype, first_line):
    corpus = Corpus.open(write_datatrove(tmp_path, dtype=dtype, first_line=first_line))
    assert corpus.read(0, 5).tolist() == [7, 8, 0, 9, 0]
    assert (corpus.num_tokens, corpus.num_documents) == (5, 2)
    assert [corpus.shard(0).document(index).tolist() for index in range(2)] == [[7, 8, 0], [9, 0]]


def test_several_datatrove_files_are_one_stream(tmp_path):
    write_datatrove(tmp_path, "000.ds")
    write_datatrove(tmp_path, "001.ds")
    corpus = Corpus.open(tmp_path / "*.ds")
    assert (corpus.num_tokens, lengths_of_documents(corpus)) == (10, [[3, 2], [3, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "6"}, r"pile\.ds has 10 bytes where pile\.ds\.metadata tells of 6 tokens, which take 2 or 4 bytes"),
        ({"first_line": "gpt2|4"}, r"pile\.ds has 10 bytes where pile\.ds\.metadata tells of 5 tokens"),
        ({"count": "five"}, r"pile\.ds\.metadata is not as datatrove writes it: TOKENIZER\|BYTES in its first line"),
        ({"ends": (3, 4)}, r"pile\.ds\.index does not end at the 5 tokens of pile\.ds; copy or write both"),
        ({"ends": ()}, r"pile\.ds\.index does not end at the 5 tokens"),
    ],
)
def test_datatrove_files_that_contradict_each_other_are_refused(tmp_path, changes, message):
    with pytest.raises(Fault, match=message):
        Corpus.open(write_datatrove(tmp_path, **changes))


@pytest.mark.parametrize("ending", ["index", "metadata"])
def test_a_datatrove_file_alone_needs_a_declared_type(tmp_path, ending):
    path = write_datatrove(tmp_path)
    Path(f"{path}.{ending}").unlink()
    with pytest.raises(Fault, match=rf"pile\.ds\.{ending} is missing; .* name the type of the tokens: .*:uint16"):
        Corpus.open(path)
    assert Corpus.open(f"{path}:uint16").read(0, 2).tolist() == [7, 8]


@pytest.mark.parametrize("total", ["00002", "00003"])
@pytest.mark.parametrize("ending", ["", ".idx"])
def test_split_parts_are_read_as_the_file_they_were(tmp_path, total, ending):
    prefix = write_split(tmp_path / "split", total=total)
    whole = Corpus.open(prefix)
    expected = whole.windows(np.arange(3), 3).tolist()
    fingerprint = whole.fingerprint
    (tmp_path / "split" / "document.bin").unlink()
    corpus = Corpus.open(f"{prefix}{ending}")
    assert (corpus.num_tokens, corpus.num_shards) == (10, 3)
    assert corpus.read(0, 10).tolist() == list(range(1, 11))
    assert corpus.windows(np.arange(3), 3).tolist() == expected
    assert corpus.fingerprint == fingerprint
    # The first document goes on in the second part.
    assert lengths_of_documents(corpus) == [[4], [1, 2], [3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "document-00001-of-00002.bin").unlink(), r"document-\*\.bin do not make one file: part 1 "),
        (lambda f: (f / "document-00002-of-00002.bin").unlink(), r"document\.bin is cut short: 14 bytes where"),
        (lambda f: (f / "document-00003-of-00004.bin").touch(), r"do not make one file: they are of several splits"),
        (lambda f: (f / "document-00000-of-00002.bin").write_bytes(b"123"), r"document\.bin is cut short: 15 bytes"),
    ],
)
def test_parts_that_do_not_make_the_file_are_refused(tmp_path, change, message):
    prefix = write_split(tmp_path / "split")
    (tmp_path / "split" / "document.bin").unlink()
    change(tmp_path / "split")
    with pytest.raises(Fault, match=message):
        Corpus.open(prefix)


def test_a_part_that_ends_within_a_token_is_refused(tmp_path):
    prefix = write_split(tmp_path / "split", cuts=(7, 14))
    (tmp_path / "split" / "document.bin").unlink()
    with pytest.raises(Fault, match=r"document-00000-of-00002\.bin has 7 bytes, no whole number of uint16 tokens"):
        Corpus.open(prefix)


def test_without_parts_the_missing_file_is_named(tmp_path):
    prefix = write_split(tmp_path / "split")
    for file in (tmp_path / "split").glob("*.bin"):
        file.unlink()
    with pytest.raises(Fault, match=r"cannot read .*document\.bin"):
        Corpus.open(prefix)


def test_a_whole_file_is_preferred_to_its_parts(tmp_path):
    prefix = write_split(tmp_path / "split")
    assert isinstance(Corpus.open(prefix).shard(0), Shard)


def test_corpora_of_equal_sizes_and_beginnings_have_different_fingerprints(tmp_path):
    numbers = np.arange(200_000, dtype=np.uint16)
    for name, change in (("a", None), ("b", 199_999), ("c", 100_000)):
        tokens = numbers % 5000
        if change:
            tokens[change - 10_000 : change + 1] += 1
        with ShardWriter(tmp_path / name, 6000) as writer:
            for part in tokens.reshape(100, -1):
                writer.add_document(part)
        tokens.tofile(tmp_path / f"{name}.npy")
    of_prefixes, of_files = (
        {Corpus.open(f"{tmp_path}/{name}{ending}").fingerprint for name in "abc"} for ending in ("", ".npy:uint16")
    )
    assert len(of_prefixes) == len(of_files) == 3
