"""Documents come out of every kind of input in order, and inputs that cannot be read are told."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from cpt_harness.inputs import TEXTS, incompressible, lines_of, table, texts_of, write_kind

from cpt.config import Fault
from cpt.data.prepare import table_readers
from cpt.data.prepare.document import Position
from cpt.data.prepare.documents import read_documents


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.stream.arrow", "A.JSONL"]
)
def test_every_kind_of_file_gives_the_same_texts(tmp_path, name):
    write_kind(tmp_path / name)
    assert texts_of([tmp_path / name]) == TEXTS


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drü".encode()))
    assert texts_of([tmp_path / "a.txt", tmp_path / "b.txt.gz"]) == ["one\r\ntwo\n", "drü"]


def test_documents_know_their_id_and_where_they_are_from(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one"], id=17) + b"\n" + lines_of(["two"]))
    pa.parquet.write_table(table(), tmp_path / "b.parquet")
    found = list(read_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]))
    assert [document.id for document in found] == ["17", f"{tmp_path}/a.jsonl:3", "doc-0", "doc-1", "doc-2"]
    assert found[1].where == f"{tmp_path}/a.jsonl:3"
    assert found[4].where == f"{tmp_path}/b.parquet, row 3"


def test_folders_are_read_deeply_and_sorted_without_hidden_and_foreign_files(tmp_path):
    for name in ("b/z.jsonl", "b/a.jsonl", "a.jsonl", ".hidden.jsonl", ".cache/x.jsonl", "README.md", "c/picture.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines_of([name]))
    assert texts_of([tmp_path]) == ["a.jsonl", "b/a.jsonl", "b/z.jsonl"]
    assert texts_of([tmp_path / "b" / "z.jsonl", tmp_path / "**" / "a.jsonl"]) == ["b/z.jsonl", "a.jsonl", "b/a.jsonl"]


def test_a_dash_reads_jsonl_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines_of(TEXTS) + b"oops\n")))
    reading = read_documents(["-"])
    assert [next(reading).text for _ in TEXTS] == TEXTS
    with pytest.raises(Fault, match="standard input:4: broken JSON"):
        next(reading)


def test_another_key_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "c", "text": "t"}\n')
    pa.parquet.write_table(pa.table({"content": ["d"]}), tmp_path / "b.parquet")
    assert texts_of([tmp_path / "a.jsonl", tmp_path / "b.parquet"], text_key="content") == ["c", "d"]


def test_only_the_text_and_id_columns_are_read(tmp_path, monkeypatch):
    pa.parquet.write_table(table(), tmp_path / "a.parquet")
    asked = []
    whole = pa.parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, columns, **options):
        asked.append(columns)
        return whole(self, *arguments, columns=columns, **options)

    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", iter_batches)
    assert texts_of([tmp_path / "a.parquet"]) == TEXTS
    assert asked == [["text", "id"]]


def test_dictionary_encoded_columns_are_text_too(tmp_path):
    pa.parquet.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert texts_of([tmp_path / "a.parquet"]) == ["a", "b", "a"]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text": "x"}\n{"text": null}\n')
    pa.parquet.write_table(pa.table({"text": ["y", None, ""]}), tmp_path / "b.parquet")
    skipped = Counter()
    assert texts_of([tmp_path / "a.jsonl", tmp_path / "b.parquet"], skipped=skipped) == ["x", "y"]
    assert skipped == {"empty document": 4}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("txet", r'has no column "txet" \(did you mean text\?\); name the column'),
        ("number", r'the column "number" holds int64, not strings; name the column of the text \(--text-key\)'),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_wrong_column_is_told(tmp_path, name, key, message):
    write_kind(tmp_path / name)
    with pytest.raises(Fault, match=message):
        texts_of([tmp_path / name], text_key=key)
    assert texts_of([tmp_path / name], text_key=key, on_error="skip") == []


def test_faulty_inputs_are_all_told_before_anything_is_read(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.docx", "b.docx"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    names = ["empty", "?.docx", "a.jsonl", "./a.jsonl", "gone.jsonl", "none*.jsonl"]
    with pytest.raises(Fault) as caught:
        read_documents([f"{tmp_path}/{name}" for name in names])
    told = "\n".join(caught.value.lines)
    assert "no input files found in the folder" in told
    assert "a.docx and 1 more: not of a known kind; known endings: .jsonl, .txt, .parquet, .arrow" in told
    assert "a.jsonl is among the inputs more than once" in told
    assert "there is no input file" in told and "gone.jsonl" in told
    assert "no input files match" in told and "none*.jsonl" in told
    assert len(caught.value.lines) == 5


def test_no_inputs_and_unknown_ways_are_faults():
    with pytest.raises(Fault, match="no input was named"):
        read_documents([])
    with pytest.raises(Fault, match="on_error = 'ignore'; known: skip, stop"):
        read_documents(["-"], on_error="ignore")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(Fault, match=r"cannot read .*a\.jsonl to its end: .*denied"):
        texts_of([tmp_path / "a.jsonl"])


def test_large_arrow_batches_are_read_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(table_readers, "ROWS_AT_ONCE", 2)
    texts = [f"text {number}" for number in range(7)]
    pa.parquet.write_table(table(texts), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", table().schema) as writer:
        writer.write_table(table(texts))
    assert texts_of([tmp_path / "a.parquet", tmp_path / "b.arrow"]) == texts + texts


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.jsonl.zst", "b.parquet", "b.arrow", "b.stream.arrow"])
def test_reading_can_begin_after_any_document(tmp_path, name, monkeypatch):
    monkeypatch.setattr(table_readers, "ROWS_AT_ONCE", 2)
    texts = [f"text {number}" for number in range(7)]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines_of(["first", "", "second"]))
    write_kind(tmp_path / name, texts)
    (tmp_path / "c.txt").write_text("last")
    inputs = [str(tmp_path / file) for file in ("a.jsonl", name, "c.txt")]
    whole = list(read_documents(inputs))
    assert [document.text for document in whole] == ["first", "second", *texts, "last"]
    for number, document in enumerate(whole):
        assert list(read_documents(inputs, start=document.end)) == whole[number + 1 :]
    assert whole[1].end == Position(0, 4)


def test_lines_before_the_start_are_not_looked_into(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{broken\n" + lines_of(["good"]))
    assert texts_of([tmp_path / "a.jsonl"], start=Position(0, 1)) == ["good"]


def test_reading_a_big_parquet_file_takes_little_memory(tmp_path):
    with pa.parquet.ParquetWriter(tmp_path / "a.parquet", table().schema, compression="none") as writer:
        for start in range(0, 120_000, 20_000):
            texts = [f"{number:08d} " + "x" * 1200 for number in range(start, start + 20_000)]
            writer.write_table(table(texts), row_group_size=60_000)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size > 100_000_000
    script = f"""
import resource
from cpt.data.prepare.documents import read_documents
documents = read_documents([{str(tmp_path / "a.parquet")!r}])
next(documents)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in documents), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, grown_kib = map(int, ended.stdout.split())
    assert count == 119_999
    assert grown_kib * 1024 < size / 4


def test_row_groups_before_the_start_are_not_read(tmp_path):
    pa.parquet.write_table(
        table(incompressible(300)), tmp_path / "a.parquet", row_group_size=100, write_page_checksum=True
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20_000] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    assert len(texts_of([tmp_path / "a.parquet"], start=Position(0, 150))) == 150


def test_domains_and_ids_are_read_under_their_keys(tmp_path):
    records = [{"text": "one", "kind": "prose", "key": "k1"}, {"text": "two", "kind": 3, "key": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = {"text": ["three"], "kind": pa.array(["code"]).dictionary_encode(), "key": [3]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "b.parquet")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet")]
    found = list(read_documents(inputs, id_key="key", domain_key="kind"))
    assert [(document.id, document.domain) for document in found] == [("k1", "prose"), ("2", "3"), ("3", "code")]
    assert [document.where for document in found] == [
        f"{tmp_path}/a.jsonl:1 (id k1)",
        f"{tmp_path}/a.jsonl:2 (id 2)",
        f"{tmp_path}/b.parquet, row 1 (id 3)",
    ]


@pytest.mark.parametrize(
    ("record", "options", "cause", "message"),
    [
        ({"knid": "x"}, {"domain_key": "kind"}, "no domain under the key", r'a\.jsonl:1 has no domain .* "kind" \(did'),
        ({"kind": ""}, {"domain_key": "kind"}, "no domain under the key", r'"kind" \(it holds ""\); name the key of'),
        ({"kind": True}, {"domain_key": "kind"}, "no domain under the key", r"it holds true\); .* \(--domain-key\)"),
        ({"kye": 1}, {"id_key": "key"}, "no id under the key", r'no key "key" \(did you mean kye\?\); .*\(--id-key\)'),
        (
            {"key": 9, "kind": 0.5},
            {"id_key": "key", "domain_key": "kind"},
            "no domain under the key",
            r":1 \(id 9\) has",
        ),
    ],
)
def test_a_missing_domain_or_id_stops_or_is_counted(tmp_path, record, options, cause, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", **record}) + "\n")
    with pytest.raises(Fault, match=message):
        texts_of([tmp_path / "a.jsonl"], **options)
    skipped = Counter()
    assert texts_of([tmp_path / "a.jsonl"], on_error="skip", skipped=skipped, **options) == []
    assert skipped == {cause: 1}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("knd", r'a\.parquet has no column "knd" \(did you mean kind\?\); name the column of the domain \(--domain-k'),
        ("share", r'a\.parquet: the column "share" holds double, not strings; name the column of the domain'),
        ("kind", r'a\.parquet, row 2 has no domain in the column "kind" \(it holds null\); name the column of the dom'),
    ],
)
def test_a_column_without_domains_is_told(tmp_path, key, message):
    columns = {"text": ["x", "y"], "kind": ["a", None], "share": [0.5, 1.0]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(Fault, match=message):
        texts_of([tmp_path / "a.parquet"], domain_key=key)


def test_a_column_without_ids_is_told(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["x"], "key": ["k"]}), tmp_path / "a.parquet")
    with pytest.raises(
        Fault, match=r'has no column "kee" \(did you mean key\?\); name the column of the id \(--id-key\)'
    ):
        texts_of([tmp_path / "a.parquet"], id_key="kee")


def test_plain_text_has_no_domain(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(Fault, match=r'a\.txt is plain text and has no domain .* "kind"; build it without --domain-key'):
        texts_of([tmp_path / "a.txt"], domain_key="kind")
