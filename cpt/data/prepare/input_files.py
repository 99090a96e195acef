"""Which files the inputs of a command stand for: files, folders and globs, sorted, each of a kind we can read."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cpt.config import Fault

STANDARD_INPUT = "-"
KINDS = (".jsonl", ".txt", ".parquet", ".arrow")
COMPRESSIBLE_KINDS = (".jsonl", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_files(inputs: Sequence[str | Path]) -> list[str]:
    """The files behind the inputs, folders and globs spread out and sorted; raises Fault for inputs without any."""
    files: list[str] = []
    faults: list[str] = []
    for given in map(str, inputs):
        found = _files_of_input(given)
        if not found:
            faults.append(_nothing_found(given))
        files += found
    twice = [name for name, count in Counter(map(os.path.realpath, files)).items() if count > 1]
    if twice:
        faults.append(f"{twice[0]} is among the inputs more than once; its text would count double")
    foreign = [name for name in files if not kind_of(name)]
    if foreign:
        others = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        faults.append(f"{foreign[0]}{others}: not of a known kind; known endings: {_known_endings()}")
    if not inputs:
        faults.append("no input was named; give files, folders or globs")
    if faults:
        raise Fault(faults)
    return files


def kind_of(name: str) -> str | None:
    """The ending that tells how to read a file, without that of its compression."""
    if name == STANDARD_INPUT:
        return ".jsonl"
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
        return ending if ending in COMPRESSIBLE_KINDS else None
    return ending if ending in KINDS else None


def _files_of_input(given: str) -> list[str]:
    if given == STANDARD_INPUT or os.path.isfile(given):
        return [given]
    if os.path.isdir(given):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(given) for name in names if kind_of(name))
        return sorted(name for name in found if not _is_hidden(os.path.relpath(name, given)))
    return sorted(name for name in glob.glob(given, recursive=True) if os.path.isfile(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _nothing_found(given: str) -> str:
    if os.path.isdir(given):
        return f"no input files found in the folder {given}; known endings: {_known_endings()}"
    if glob.has_magic(given):
        return f"no input files match {given}"
    return f"there is no input file {given}"


def _known_endings() -> str:
    return ", ".join([*KINDS, *(kind + ending for kind in COMPRESSIBLE_KINDS for ending in COMPRESSIONS)])
