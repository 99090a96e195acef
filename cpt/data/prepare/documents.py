"""Documents out of files: jsonl, parquet, arrow and plain text, one document at a time, in the order of the inputs.

A fault in the input stops the reading and tells file and line; with `on_error="skip"` it is counted by cause and left
out. A NUL character in a text is such a fault: it is a sign of damage, and tools differ in what they make of it. A
compressed file is tested whole before anything is taken from it. Memory holds one document, or one small batch of a
parquet or arrow file. Every document knows its position, and reading can begin after any of them: what comes before is
passed over without being looked into.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from cpt.config import Fault
from cpt.data.prepare.document import START, Cause, Document, Keys, Position, Source, Troubles
from cpt.data.prepare.input_files import find_files, kind_of
from cpt.data.prepare.table_readers import read_arrow, read_parquet
from cpt.data.prepare.text_readers import read_jsonl, read_text

logger = logging.getLogger(__name__)

READERS = {".jsonl": read_jsonl, ".txt": read_text, ".parquet": read_parquet, ".arrow": read_arrow}


def read_documents(
    inputs: Sequence[str | Path],
    text_key: str = "text",
    on_error: str = "stop",
    skipped: Counter[str] | None = None,
    *,
    id_key: str | None = None,
    domain_key: str | None = None,
    start: Position = START,
) -> Iterator[Document]:
    """The documents of all inputs, in order; files of a folder or glob are sorted by name.

    inputs: files (.jsonl, .txt, either also .gz or .zst; .parquet, .arrow), folders, globs, "-" for jsonl on standard
        input. A .txt file is one document. One longer than LONGEST_DOCUMENT_BYTES is a fault.
    text_key: the key or column that holds the text.
    on_error: "stop" raises Fault at the first fault; "skip" goes on, and warns at the end with a count by cause.
    skipped: counts by cause are added here. Empty documents are always skipped and counted.
    id_key: the key or column of the id, which every document must then have; if None, "id" where there is one.
    domain_key: the key or column of the domain, which every document must then have.
    start: the end of the last document that is not wanted any more.

    Raises Fault at once if an input does not exist, holds no file to read, or is named twice.
    """
    if on_error not in ("stop", "skip"):
        raise Fault(f"on_error = {on_error!r}; known: skip, stop")
    files = find_files(inputs)
    troubles = Troubles(on_error == "skip", Counter() if skipped is None else skipped)
    return _read_files(files, start, Keys(text_key, id_key, domain_key), troubles)


def _read_files(files: list[str], start: Position, keys: Keys, troubles: Troubles) -> Iterator[Document]:
    for number in range(start.file, len(files)):
        name = files[number]
        source = Source(name, number, start.record if number == start.file else 0)
        is_begun = source.start > 0
        try:
            for document in READERS[kind_of(name)](source, keys, troubles):
                if not document.text:
                    troubles.counts[Cause.EMPTY] += 1
                elif "\0" in document.text:
                    place = f"U+0000 at character {document.text.index(chr(0))} of the text"
                    what = f"{document.where}: {Cause.NUL} ({place})"
                    troubles.meet(Cause.NUL, what, "take such characters out of it")
                else:
                    is_begun = True
                    yield document
        # Arrow tells of damage by errors of its own, which are ValueErrors or OSErrors in part only, and damaged names
        # of columns or ids are no UTF-8.
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            outcome = "the rest of it is skipped" if is_begun else "none of its documents is taken"
            what = f"cannot read {name} to its end: {reason}"
            troubles.meet(Cause.DAMAGED_FILE, what, "mend or replace the file", outcome)
    if troubles.counts:
        counts = ", ".join(f"{count:,} {cause}" for cause, count in sorted(troubles.counts.items()))
        logger.warning("skipped in the input: %s", counts)
