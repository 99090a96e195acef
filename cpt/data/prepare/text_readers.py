"""Documents out of .jsonl and .txt files, compressed or not."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from cpt.config.faults import nearest
from cpt.data.prepare.document import (
    READ_BUFFER_BYTES,
    USUAL_ID_KEY,
    Cause,
    Document,
    Keys,
    Position,
    Source,
    Troubles,
    is_domain,
    kind_of_value,
    shown,
)
from cpt.data.prepare.input_files import COMPRESSIONS, STANDARD_INPUT


def read_jsonl(source: Source, keys: Keys, troubles: Troubles) -> Iterator[Document]:
    """The documents of a file, or of standard input, with an object in JSON on every line."""
    shown_name = "standard input" if source.name == STANDARD_INPUT else source.name
    with _open(source.name) as stream:
        for number, line in enumerate(_lines(stream, troubles.longest_bytes), start=1):
            if number <= source.start:
                continue
            where = f"{shown_name}:{number}"
            if line is None:
                troubles.meet_too_long(where)
                continue
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
                troubles.meet(Cause.BROKEN_JSON, f"{where}: {Cause.BROKEN_JSON} ({error})", "mend the line")
                continue
            document = _document_of_record(record, keys, where, source.end(number), troubles)
            if document:
                yield document


def _lines(stream: BinaryIO, longest_bytes: int) -> Iterator[bytes | None]:
    """The lines with their ends, and None in the place of a longer one, which is passed over in pieces."""
    for line in iter(functools.partial(stream.readline, longest_bytes + 1), b""):
        if len(line) <= longest_bytes or line.endswith(b"\n"):
            yield line
            continue
        del line
        while (piece := stream.readline(READ_BUFFER_BYTES)) and not piece.endswith(b"\n"):
            pass
        yield None


def _document_of_record(record: Any, keys: Keys, where: str, end: Position, troubles: Troubles) -> Document | None:
    text_key = keys.text
    identity = where
    if isinstance(record, dict) and (keys.id or USUAL_ID_KEY) in record:
        identity = str(record[keys.id or USUAL_ID_KEY])
        # A line number finds a line of this file; an id finds the document in what the file was made of.
        where = f"{where} (id {identity})" if keys.id else where
    if not isinstance(record, dict):
        what = f"{where} holds {kind_of_value(record)}, not an object with keys"
        troubles.meet(Cause.BROKEN_JSON, what, "mend the line")
    elif text_key not in record:
        known = nearest(text_key, record) if record else "it has no keys"
        troubles.meet(
            Cause.NO_TEXT, f'{where} has no key "{text_key}" ({known})', "name the key of the text (--text-key)"
        )
    elif not isinstance(record[text_key], str | None):
        what = f'{where}: "{text_key}" holds {kind_of_value(record[text_key])}, not a string'
        troubles.meet(Cause.NO_TEXT, what, "name the key of the text (--text-key)")
    elif keys.id is not None and keys.id not in record:
        what = f'{where} has no key "{keys.id}" ({nearest(keys.id, record)})'
        troubles.meet(Cause.NO_ID, what, "name the key of the id (--id-key)")
    elif keys.domain is not None and not is_domain(record.get(keys.domain)):
        found = shown(record[keys.domain]) if keys.domain in record else nearest(keys.domain, record)
        what = f'{where} has no domain under the key "{keys.domain}" ({found})'
        troubles.meet(Cause.NO_DOMAIN, what, "name the key of the domain (--domain-key)")
    else:
        text = record[text_key] or ""
        try:
            # JSON may escape half of a surrogate pair, which no encoding of text can hold.
            text.encode()
        except UnicodeEncodeError as error:
            what = f"{where}: {Cause.INVALID_UTF8} (half a surrogate pair at character {error.start} of the text)"
            troubles.meet(Cause.INVALID_UTF8, what, "mend the line")
            return None
        domain = "" if keys.domain is None else str(record[keys.domain])
        return Document(text, identity, where, domain, end)
    return None


def read_text(source: Source, keys: Keys, troubles: Troubles) -> Iterator[Document]:
    """The only document of a file of plain text."""
    name = source.name
    if source.start:
        return
    if keys.domain is not None:
        what = f'{name} is plain text and has no domain under the key "{keys.domain}"'
        troubles.meet(Cause.NO_DOMAIN, what, "build it without --domain-key")
        return
    with _open(name) as stream:
        content = stream.read(troubles.longest_bytes + 1)
    if len(content) > troubles.longest_bytes:
        troubles.meet_too_long(name)
        return
    text = _decoded(content.removeprefix(b"\xef\xbb\xbf"), name, troubles)
    if text is not None:
        yield Document(text, name, name, end=source.end(1))


def _decoded(content: bytes, where: str, troubles: Troubles) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        what = f"{where}: {Cause.INVALID_UTF8} (byte {content[error.start]:#04x} at position {error.start})"
        troubles.meet(Cause.INVALID_UTF8, what, "write the file in UTF-8")
        return None


def _open(name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The bytes of a file, decompressed: of a compressed one, of which all is sound.

    Arrow's streams notice truncation and read files of several members. Raises OSError for a damaged file.
    """
    if name == STANDARD_INPUT:
        return contextlib.nullcontext(sys.stdin.buffer)
    compression = COMPRESSIONS.get(os.path.splitext(name.lower())[1])
    if compression:
        _refuse_damaged(name, compression)
    return io.BufferedReader(pa.input_stream(name, compression=compression), READ_BUFFER_BYTES)


def _refuse_damaged(name: str, compression: str) -> None:
    """Raises OSError if a compressed file is cut short, followed by garbage, or does not agree with its checksums.

    A checksum comes after what it is of, and what a damaged file gives until then may look like text. Nothing may be
    taken from it before, not even by a build that then stops: that may go on later, skipping what is damaged.
    """
    if os.path.getsize(name) == 0:
        raise OSError(f"it is empty, which no {compression} file is")
    with pa.input_stream(name, compression=compression) as stream:
        while stream.read(READ_BUFFER_BYTES):
            pass
