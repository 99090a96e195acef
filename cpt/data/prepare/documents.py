"""Documents out of files: jsonl, parquet, arrow and plain text, one document at a time, in the order of the inputs.

A fault in the input stops the reading and tells file and line; with `on_error="skip"` it is counted by cause and left
out. Memory holds one document, or one small batch of a parquet or arrow file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from cpt.config import Fault
from cpt.config.faults import nearest
from cpt.data.prepare.input_files import COMPRESSIONS, STANDARD_INPUT, find_files, kind_of

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
READ_BUFFER_BYTES = 2**20

EMPTY_DOCUMENT = "empty document"
BROKEN_JSON = "broken JSON"
NO_TEXT_KEY = "no text under the key"
INVALID_UTF8 = "invalid UTF-8"
DAMAGED_FILE = "damaged file"


@dataclass(frozen=True, slots=True)
class Document:
    """A text, its id (the input's own `id`, else where it is from), and where it is from: file and line or row."""

    text: str
    id: str
    where: str


def read_documents(
    inputs: Sequence[str | Path],
    text_key: str = "text",
    on_error: str = "stop",
    skipped: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of all inputs, in order; files of a folder or glob are sorted by name.

    inputs: files (.jsonl, .txt, either also .gz or .zst; .parquet, .arrow), folders, globs, "-" for jsonl on standard
        input. A .txt file is one document.
    text_key: the key or column that holds the text.
    on_error: "stop" raises Fault at the first fault; "skip" goes on, and warns at the end with a count by cause.
    skipped: counts by cause are added here. Empty documents are always skipped and counted.

    Raises Fault at once if an input does not exist, holds no file to read, or is named twice.
    """
    if on_error not in ("stop", "skip"):
        raise Fault(f"on_error = {on_error!r}; known: skip, stop")
    files = find_files(inputs)
    return _read_files(files, text_key, _Troubles(on_error == "skip", Counter() if skipped is None else skipped))


class _Troubles:
    """Faults in the input: raised, or counted by cause with a word about the first of each."""

    def __init__(self, is_skipping: bool, counts: Counter[str]) -> None:
        self._is_skipping = is_skipping
        self.counts = counts

    def meet(self, cause: str, what: str, way_out: str) -> None:
        if not self._is_skipping:
            raise Fault(f"{what}; {way_out}, or leave such input out with --on-error skip")
        if self.counts[cause] == 0:
            logger.warning("%s; it is skipped, and others like it are counted", what)
        self.counts[cause] += 1


def _read_files(files: list[str], text_key: str, troubles: _Troubles) -> Iterator[Document]:
    for name in files:
        try:
            for document in READERS[kind_of(name)](name, text_key, troubles):
                if document.text:
                    yield document
                else:
                    troubles.counts[EMPTY_DOCUMENT] += 1
        # Arrow tells of damage by errors of its own, which are ValueErrors or OSErrors in part only.
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            troubles.meet(DAMAGED_FILE, f"cannot read {name} to its end: {reason}", "mend or replace the file")
    if troubles.counts:
        counts = ", ".join(f"{count:,} {cause}" for cause, count in sorted(troubles.counts.items()))
        logger.warning("skipped in the input: %s", counts)


def _open(name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The bytes of a file, decompressed. Arrow's streams notice truncation and read files of several members."""
    if name == STANDARD_INPUT:
        return contextlib.nullcontext(sys.stdin.buffer)
    compression = COMPRESSIONS.get(os.path.splitext(name.lower())[1])
    return io.BufferedReader(pa.input_stream(name, compression=compression), READ_BUFFER_BYTES)


def _read_jsonl(name: str, text_key: str, troubles: _Troubles) -> Iterator[Document]:
    shown_name = "standard input" if name == STANDARD_INPUT else name
    with _open(name) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{shown_name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            text = _decoded(line, where, troubles)
            if text is None:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                troubles.meet(BROKEN_JSON, f"{where}: {BROKEN_JSON} ({error})", "mend the line")
                continue
            document = _document_of_record(record, text_key, where, troubles)
            if document:
                yield document


def _document_of_record(record: Any, text_key: str, where: str, troubles: _Troubles) -> Document | None:
    if not isinstance(record, dict):
        kind = type(record).__name__
        troubles.meet(BROKEN_JSON, f"{where} holds a {kind}, not an object with keys", "mend the line")
    elif text_key not in record:
        known = nearest(text_key, record) if record else "it has no keys"
        troubles.meet(
            NO_TEXT_KEY, f'{where} has no key "{text_key}" ({known})', "name the key of the text (--text-key)"
        )
    elif not isinstance(record[text_key], str | None):
        kind = type(record[text_key]).__name__
        what = f'{where}: "{text_key}" holds a {kind}, not a string'
        troubles.meet(NO_TEXT_KEY, what, "name the key of the text (--text-key)")
    else:
        text = record[text_key] or ""
        try:
            # JSON may escape half of a surrogate pair, which no encoding of text can hold.
            text.encode()
        except UnicodeEncodeError as error:
            what = f"{where}: {INVALID_UTF8} (half a surrogate pair at character {error.start} of the text)"
            troubles.meet(INVALID_UTF8, what, "mend the line")
            return None
        return Document(text, str(record.get("id", where)), where)
    return None


def _decoded(content: bytes, where: str, troubles: _Troubles) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        what = f"{where}: {INVALID_UTF8} (byte {content[error.start]:#04x} at position {error.start})"
        troubles.meet(INVALID_UTF8, what, "write the file in UTF-8")
        return None


def _read_text(name: str, text_key: str, troubles: _Troubles) -> Iterator[Document]:
    with _open(name) as stream:
        text = _decoded(stream.read().removeprefix(b"\xef\xbb\xbf"), name, troubles)
    if text is not None:
        yield Document(text, name, name)


def _read_parquet(name: str, text_key: str, troubles: _Troubles) -> Iterator[Document]:
    # With a buffer, pages are read as they are needed; without, a whole row group at once.
    options = {"buffer_size": READ_BUFFER_BYTES, "page_checksum_verification": True}
    with pa.parquet.ParquetFile(name, **options) as file:
        columns = _columns(file.schema_arrow, name, text_key, troubles)
        if columns:
            yield from _read_batches(file.iter_batches(ROWS_AT_ONCE, columns=columns), name, text_key, troubles)


def _read_arrow(name: str, text_key: str, troubles: _Troubles) -> Iterator[Document]:
    with pa.memory_map(name) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            # Hugging Face datasets are stored in the streaming variant of the format.
            source.seek(0)
            reader = batches = pa.ipc.open_stream(source)
        columns = _columns(reader.schema, name, text_key, troubles)
        if columns:
            slices = (
                batch.slice(start, ROWS_AT_ONCE).select(columns)
                for batch in batches
                for start in range(0, batch.num_rows, ROWS_AT_ONCE)
            )
            yield from _read_batches(slices, name, text_key, troubles)


def _columns(schema: pa.Schema, name: str, text_key: str, troubles: _Troubles) -> list[str]:
    """The columns to read: the text and, where there is one, the id. Empty after trouble."""
    if text_key not in schema.names:
        what = f'{name} has no column "{text_key}" ({nearest(text_key, schema.names)})'
        troubles.meet(NO_TEXT_KEY, what, "name the column of the text (--text-key)")
        return []
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        what = f'{name}: the column "{text_key}" holds {kind}, not strings'
        troubles.meet(NO_TEXT_KEY, what, "name the column of the text (--text-key)")
        return []
    return [text_key, "id"] if "id" in schema.names and text_key != "id" else [text_key]


def _read_batches(
    batches: Iterator[pa.RecordBatch], name: str, text_key: str, troubles: _Troubles
) -> Iterator[Document]:
    row = 0
    for batch in batches:
        texts = batch.column(text_key)
        ids = batch.column("id") if "id" in batch.schema.names else None
        for index in range(batch.num_rows):
            row += 1
            where = f"{name}, row {row}"
            try:
                text = texts[index].as_py() or ""
            except UnicodeDecodeError as error:
                what = f"{where}: {INVALID_UTF8} (at position {error.start} of the text)"
                troubles.meet(INVALID_UTF8, what, "write the text in UTF-8")
                continue
            yield Document(text, where if ids is None else str(ids[index].as_py()), where)


READERS = {".jsonl": _read_jsonl, ".txt": _read_text, ".parquet": _read_parquet, ".arrow": _read_arrow}
