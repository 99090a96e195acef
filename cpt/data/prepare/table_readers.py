"""Documents out of .parquet and .arrow files, of which only the columns asked for are read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from cpt.config.faults import nearest
from cpt.data.prepare.document import (
    READ_BUFFER_BYTES,
    USUAL_ID_KEY,
    Cause,
    Document,
    Keys,
    Source,
    Troubles,
    is_domain,
    shown,
)

ROWS_AT_ONCE = 256


def read_parquet(source: Source, keys: Keys, troubles: Troubles) -> Iterator[Document]:
    """The documents of a parquet file, a row each; row groups before the start are not read."""
    # With a buffer, pages are read as they are needed; without, a whole row group at once.
    options = {"buffer_size": READ_BUFFER_BYTES, "page_checksum_verification": True}
    with pa.parquet.ParquetFile(source.name, **options) as file:
        columns = _columns(file.schema_arrow, source.name, keys, troubles)
        if columns:
            groups = list(range(file.num_row_groups))
            num_passed = 0
            while groups and num_passed + file.metadata.row_group(groups[0]).num_rows <= source.start:
                num_passed += file.metadata.row_group(groups.pop(0)).num_rows
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns)
            yield from _read_batches(batches, num_passed, source, keys, troubles)


def read_arrow(source: Source, keys: Keys, troubles: Troubles) -> Iterator[Document]:
    """The documents of an Arrow file of either variant, a row each."""
    with pa.memory_map(source.name) as content:
        try:
            reader = pa.ipc.open_file(content)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            # Hugging Face datasets are stored in the streaming variant of the format.
            content.seek(0)
            reader = batches = pa.ipc.open_stream(content)
        columns = _columns(reader.schema, source.name, keys, troubles)
        if columns:
            slices = (
                batch.slice(start, ROWS_AT_ONCE)
                for batch in (_checked(batch.select(columns)) for batch in batches)
                for start in range(0, batch.num_rows, ROWS_AT_ONCE)
            )
            yield from _read_batches(slices, 0, source, keys, troubles)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch of an Arrow file; ArrowInvalid if its columns point outside of it.

    The format has no checksums, and to follow such a pointer ends the process.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            # Told later, with the row; pointers are looked at first.
            if "UTF8" not in str(error):
                raise
    return batch


def _columns(schema: pa.Schema, name: str, keys: Keys, troubles: Troubles) -> list[str]:
    """The columns to read: text, id and domain, as far as they are asked for or there. Empty after trouble."""
    wanted = [
        (keys.text, Cause.NO_TEXT, "text", _is_text),
        (keys.id, Cause.NO_ID, "id", None),
        (keys.domain, Cause.NO_DOMAIN, "domain", lambda kind: _is_text(kind) or pa.types.is_integer(kind)),
    ]
    columns = []
    for column, cause, role, is_fit in wanted:
        if column is None:
            continue
        way_out = f"name the column of the {role} (--{role}-key)"
        if column not in schema.names:
            troubles.meet(cause, f'{name} has no column "{column}" ({nearest(column, schema.names)})', way_out)
            return []
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if is_fit and not is_fit(kind):
            troubles.meet(cause, f'{name}: the column "{column}" holds {kind}, not strings', way_out)
            return []
        columns.append(column)
    if keys.id is None and USUAL_ID_KEY in schema.names:
        columns.append(USUAL_ID_KEY)
    return list(dict.fromkeys(columns))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_batches(
    batches: Iterator[pa.RecordBatch], row: int, source: Source, keys: Keys, troubles: Troubles
) -> Iterator[Document]:
    """The documents of batches of which the first begins after `row` rows."""
    id_key = keys.id or USUAL_ID_KEY
    for batch in batches:
        first_row, row = row, row + batch.num_rows
        texts = batch.column(keys.text)
        ids = batch.column(id_key) if id_key in batch.schema.names else None
        domains = None if keys.domain is None else batch.column(keys.domain)
        for index in range(max(0, source.start - first_row), batch.num_rows):
            number = first_row + index + 1
            where = f"{source.name}, row {number}"
            identity = where if ids is None else str(ids[index].as_py())
            if keys.id:
                where = f"{where} (id {identity})"
            try:
                text = texts[index].as_py() or ""
                domain = "" if domains is None else domains[index].as_py()
            except UnicodeDecodeError as error:
                what = f"{where}: {Cause.INVALID_UTF8} (at position {error.start} of the text)"
                troubles.meet(Cause.INVALID_UTF8, what, "write the text in UTF-8")
                continue
            if len(text) > troubles.longest_bytes:
                troubles.meet_too_long(where)
                continue
            if keys.domain is not None and not is_domain(domain):
                what = f'{where} has no domain in the column "{keys.domain}" ({shown(domain)})'
                troubles.meet(Cause.NO_DOMAIN, what, "name the column of the domain (--domain-key)")
                continue
            yield Document(text, identity, where, str(domain), source.end(number))
