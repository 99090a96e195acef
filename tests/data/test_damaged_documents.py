"""Bad lines, damaged files and documents that are too long are told with file and line, or counted."""

from __future__ import annotations

import gzip
import io
import logging
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from cpt_harness.inputs import incompressible, lines_of, table, texts_of, write_kind

from cpt.config import Fault
from cpt.data.prepare import document, text_readers
from cpt.data.prepare.documents import read_documents

BAD_LINES = [
    (b'{"text": "cut\n', "broken JSON", r"a\.jsonl:2: broken JSON \(.*\); mend the line, or .* --on-error skip"),
    (b"[" * 100_000 + b"\n", "broken JSON", r"a\.jsonl:2: broken JSON"),
    (b'["text"]\n', "broken JSON", r"a\.jsonl:2 holds a list, not an object"),
    (b'{"txt": "x", "n": 1}\n', "no text under the key", r'a\.jsonl:2 has no key "text" \(did you mean txt\?\); name'),
    (b'{"n": 1, "q": 2}\n', "no text under the key", r'has no key "text" \(known: n, q\); name .*\(--text-key'),
    (b"{}\n", "no text under the key", r'has no key "text" \(it has no keys\)'),
    (b'{"text": 7}\n', "no text under the key", r'a\.jsonl:2: "text" holds an int, not a string'),
    (b"[7]\n", "broken JSON", r"a\.jsonl:2 holds a list, not an object"),
    (b"7\n", "broken JSON", r"a\.jsonl:2 holds an int, not an object"),
    (b'{"text": "a\0b"}\n', "broken JSON", r"a\.jsonl:2: broken JSON \(Invalid control character"),
    (
        b'{"text": "ab\\u0000"}\n',
        "NUL character",
        r"a\.jsonl:2: NUL character \(U\+0000 at character 2 of the text\); take such characters out of it, or .* skip",
    ),
    (b'{"text": "\xff"}\n', "invalid UTF-8", r"a\.jsonl:2: invalid UTF-8 \(byte 0xff at position 10\); write the file"),
    (b'{"text": "x\\ud800"}\n', "invalid UTF-8", r"a\.jsonl:2: invalid UTF-8 \(half a surrogate pair at character 1"),
]


@pytest.mark.parametrize(("line", "cause", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_with_file_and_line(tmp_path, line, cause, message):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["good"]) + line + lines_of(["too"]))
    reading = read_documents([str(tmp_path / "a.jsonl")])
    assert next(reading).text == "good"
    with pytest.raises(Fault, match=message):
        next(reading)


@pytest.mark.parametrize(("line", "cause", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_counted_when_skipped(tmp_path, line, cause, message, caplog):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["good"]) + line + line + lines_of(["too"]))
    skipped = Counter()
    with caplog.at_level(logging.WARNING):
        assert texts_of([tmp_path / "a.jsonl"], on_error="skip", skipped=skipped) == ["good", "too"]
    assert skipped == {cause: 2}
    # The first is told in full, the rest as a count.
    assert len(caplog.messages) == 2
    assert "a.jsonl:2" in caplog.messages[0]
    assert caplog.messages[1] == f"skipped in the input: 2 {cause}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.arrow"])
def test_a_document_that_is_too_long_stops_or_is_counted(tmp_path, name, monkeypatch):
    monkeypatch.setattr(document, "LONGEST_DOCUMENT_BYTES", 1000)
    if name == "a.txt":
        (tmp_path / name).write_text("x" * 1001)
        kept = []
    else:
        kept = ["first", "y" * 900]
        write_kind(tmp_path / name, ["first", "x" * 5000, "y" * 900])
    place = {"a.txt": "a.txt", "a.parquet": "a.parquet, row 2", "a.arrow": "a.arrow, row 2"}.get(name, f"{name}:2")
    message = rf"{place} is longer than 1,000 bytes, the most for one document; split the document, or leave .* skip"
    with pytest.raises(Fault, match=message):
        texts_of([tmp_path / name])
    skipped = Counter()
    assert texts_of([tmp_path / name], on_error="skip", skipped=skipped) == kept
    assert skipped == {"document too long": 1}


def test_a_line_that_is_too_long_is_passed_over_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "LONGEST_DOCUMENT_BYTES", 1000)
    asked = []

    class Recording(io.BytesIO):
        def readline(self, size=-1):
            line = super().readline(size)
            asked.append(len(line))
            return line

    content = lines_of(["first", "x" * 5_000_000, "last"]) + b"z" * 3000
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": Recording(content)}))
    skipped = Counter()
    assert texts_of(["-"], on_error="skip", skipped=skipped) == ["first", "last"]
    assert max(asked) <= 2**20
    # The last one, without an end, is longer as well.
    assert skipped == {"document too long": 2}


def test_a_hole_of_zeros_is_broken_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["good"]) + b"\0" * 5000)
    with pytest.raises(Fault, match=r"a\.jsonl:2: broken JSON"):
        texts_of([tmp_path / "a.jsonl"])
    skipped = Counter()
    assert texts_of([tmp_path / "a.jsonl"], on_error="skip", skipped=skipped) == ["good"]
    assert skipped == {"broken JSON": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.gz", "a.parquet", "a.arrow", "a.stream.arrow"])
def test_text_with_a_nul_character_stops_or_is_counted(tmp_path, name):
    if ".txt" in name:
        (tmp_path / name).write_bytes(gzip.compress(b"no\0text") if name.endswith(".gz") else b"no\0text")
        kept = []
    else:
        kept = ["first", "third"]
        write_kind(tmp_path / name, ["first", "no\0text", "third"])
    place = {"parquet": ", row 2", "arrow": ", row 2", "gz": ":2"}.get("" if kept == [] else name.split(".")[-1], "")
    with pytest.raises(Fault, match=rf"{name}{place}: NUL character \(U\+0000 at character 2 of the text\)"):
        texts_of([tmp_path / name])
    skipped = Counter()
    assert texts_of([tmp_path / name], on_error="skip", skipped=skipped) == kept
    assert skipped == {"NUL character": 1}


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 3])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.stream.arrow"])
def test_a_truncated_file_stops_or_is_counted(tmp_path, name):
    write_kind(tmp_path / name, incompressible(3000))
    cut(tmp_path / name)
    with pytest.raises(Fault, match=rf"cannot read .*{name} to its end: .*; mend or replace the file, or .*skip"):
        texts_of([tmp_path / name])
    skipped = Counter()
    (tmp_path / "z.jsonl").write_bytes(lines_of(["after"]))
    assert texts_of([tmp_path / name, tmp_path / "z.jsonl"], on_error="skip", skipped=skipped)[-1] == "after"
    assert skipped == {"damaged file": 1}


def with_checksum(name: str, content: bytes) -> bytes:
    """The content compressed as one member that ends in a checksum."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["a bit flipped", "checksum changed", "garbage behind", "cut short"])
def test_of_a_damaged_compressed_file_no_document_is_taken(tmp_path, name, damage, on_error, monkeypatch, caplog):
    # Less than the file, so that documents are there before its end is.
    monkeypatch.setattr(text_readers, "READ_BUFFER_BYTES", 1000)
    content = bytearray(with_checksum(name, lines_of(incompressible(3000))))
    if damage == "cut short":
        del content[-20:]
    elif damage == "garbage behind":
        content += b"garbage"
    else:
        content[len(content) // 2 if damage == "a bit flipped" else -6 if name.endswith(".gz") else -2] ^= 1
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.jsonl").write_bytes(lines_of(["after"]))
    inputs = [str(tmp_path / name), str(tmp_path / "z.jsonl")]
    if on_error == "stop":
        with pytest.raises(Fault, match=rf"cannot read .*{name} to its end: .*; mend or replace the file"):
            next(read_documents(inputs))
        return
    skipped = Counter()
    assert texts_of(inputs, on_error="skip", skipped=skipped) == ["after"]
    assert skipped == {"damaged file": 1}
    assert caplog.messages[0].endswith("; none of its documents is taken, and others like it are counted")


def test_of_another_damaged_file_what_comes_before_the_damage_is_taken_and_the_log_says_so(tmp_path, caplog):
    write_kind(tmp_path / "a.stream.arrow", incompressible(300))
    cut(tmp_path / "a.stream.arrow")
    assert 0 < len(texts_of([tmp_path / "a.stream.arrow"], on_error="skip")) < 300
    assert caplog.messages[0].endswith("; the rest of it is skipped, and others like it are counted")


def test_a_compressed_file_is_tested_in_bounded_memory(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 200_000_000 + b"\n" + lines_of(["x"]), 1))
    script = f"""
import resource
from cpt.data.prepare.text_readers import _refuse_damaged
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_refuse_damaged({str(tmp_path / "a.jsonl.gz")!r}, "gzip")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ended.stdout) * 1024 < 20_000_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_compressed_file_of_which_nothing_is_left_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Fault, match=r"to its end: it is empty, which no (gzip|zstd) file is; mend or replace the file"):
        texts_of([tmp_path / name])


@pytest.mark.parametrize("name", ["a.arrow", "a.stream.arrow"])
def test_an_arrow_file_whose_texts_lie_outside_is_told(tmp_path, name):
    texts = ["a" * 10, "b" * 10, "c" * 10]
    make = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
    with make(tmp_path / name, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts}))
    content = (tmp_path / name).read_bytes()
    offsets = struct.pack("<4i", 0, 10, 20, 30)
    assert content.count(offsets) == 1
    for wrong in (2**30, -5):
        (tmp_path / name).write_bytes(content.replace(offsets, struct.pack("<4i", 0, wrong, 20, 30)))
        with pytest.raises(Fault, match=rf"cannot read .*{name} to its end: "):
            texts_of([tmp_path / name])


def test_ids_that_are_no_utf8_are_told(tmp_path):
    ids = pa.array([b"fine", b"bad\xff"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": ["x", "y"], "id": ids}), tmp_path / "a.parquet")
    with pytest.raises(Fault, match=r"cannot read .*a\.parquet to its end: 'utf-8' codec can't decode byte 0xff"):
        texts_of([tmp_path / "a.parquet"])


def test_a_changed_parquet_page_is_told(tmp_path):
    pa.parquet.write_table(
        table(incompressible(300)), tmp_path / "a.parquet", use_dictionary=False, write_page_checksum=True
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20_000] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(Fault, match=r"cannot read .*a\.parquet to its end"):
        texts_of([tmp_path / "a.parquet"])


def test_invalid_utf8_in_a_column_names_the_row(tmp_path):
    column = pa.array([b"fine", b"bad\xff", b"too"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(Fault, match=r"a\.parquet, row 2: invalid UTF-8 \(at position 3"):
        texts_of([tmp_path / "a.parquet"])
    assert texts_of([tmp_path / "a.parquet"], on_error="skip") == ["fine", "too"]


def test_invalid_utf8_in_a_text_file_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes("käse".encode("latin-1"))
    with pytest.raises(Fault, match=r"a\.txt: invalid UTF-8 \(byte 0xe4 at position 1\)"):
        texts_of([tmp_path / "a.txt"])
