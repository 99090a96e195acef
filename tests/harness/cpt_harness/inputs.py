"""Input files of every kind that a build reads, and what is read out of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from cpt.data.prepare.documents import read_documents

TEXTS = ["first", "second\nline", "third ü 漢字 😀"]


def lines_of(texts: list[str], **more: object) -> bytes:
    """The texts as lines of JSON; `more` is in each."""
    return b"".join(json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n" for text in texts)


def texts_of(inputs: list[Path | str], **options: object) -> list[str]:
    """The texts that `read_documents` gives."""
    return [document.text for document in read_documents([str(given) for given in inputs], **options)]


def table(texts: list[str] = TEXTS) -> pa.Table:
    """The texts as a table with two more columns."""
    numbers = list(range(len(texts)))
    return pa.table({"number": numbers, "text": texts, "id": [f"doc-{number}" for number in numbers]})


def write_kind(path: Path, texts: list[str] = TEXTS) -> None:
    """Writes the texts as a file of the kind that its ending tells."""
    if path.name.endswith(".gz"):
        # Two members one after the other, as parallel compressors and `cat` write them.
        path.write_bytes(gzip.compress(lines_of(texts[:1])) + gzip.compress(lines_of(texts[1:])))
    elif path.name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines_of(texts[:1])) + compress(lines_of(texts[1:])))
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table(texts), path, row_group_size=2)
    elif path.name.endswith(".stream.arrow"):
        with pa.ipc.new_stream(path, table().schema) as writer:
            writer.write_table(table(texts), max_chunksize=2)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table().schema) as writer:
            writer.write_table(table(texts), max_chunksize=2)
    else:
        path.write_bytes(lines_of(texts))


def incompressible(count: int) -> list[str]:
    """Texts of which no file gets much smaller."""
    generator = random.Random(0)
    return [generator.randbytes(200).hex() for _ in range(count)]
