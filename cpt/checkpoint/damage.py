"""What is wrong with a checkpoint: files that are missing or changed, elements that no piece or two pieces hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpt.checkpoint.write import READABLE_VERSIONS, checksum
from cpt.config import Fault

CHECKSUMS, INDEX, STATE = "checksums.json", "index.json", "state.json"


class Unreadable(str):
    """A line about a file that the disk does not give. It may yet, where a file system is away for a while."""


def read_json(path: Path) -> dict[str, Any]:
    """The names and values in a file of a checkpoint. Raises Fault that names the file; passing, if the disk fails."""
    return _parsed(path, _bytes_of(path))


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksum of each of the other files. Raises Fault if one byte is not as it was written, even a line's end."""
    path = folder / CHECKSUMS
    content = _bytes_of(path)
    sums = _parsed(path, content)
    # Not as text: what reads that takes one line's end for another.
    if content != json.dumps(sums, indent=1).encode() or not {INDEX, STATE} <= set(sums):
        raise Fault(f"{path} has changed since it was written: the checkpoint is damaged")
    return sums


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Fault(f"{path} is missing: this is no checkpoint, or a damaged one") from None
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error}", is_passing=True) from None


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise Fault(f"{path} cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise Fault(f"{path} holds a {type(plain).__name__}, expected names and values: the checkpoint is damaged")
    return plain


def damaged_files(
    folder: Path,
    sums: Mapping[str, str],
    advance: Callable[[int], object] = lambda num_bytes: None,
    share: slice = slice(None),
) -> Iterator[str]:
    """A line for each file that is missing, cannot be read or has another checksum; `advance(bytes)` is told what was
    read. `share`: of the files in the order of their names, those to read through.
    """
    yield from missing_files(folder, sums)
    for name in sorted(sums)[share]:
        path = folder / name
        try:
            is_same = not path.is_file() or checksum(path, advance) == sums[name]
        except OSError as error:
            yield Unreadable(f"{path} cannot be read: {error.strerror or error}: the checkpoint cannot be used")
            continue
        if not is_same:
            yield f"{path} has changed since it was written, or {folder / CHECKSUMS} has: the checkpoint is damaged"


def missing_files(folder: Path, sums: Mapping[str, str]) -> Iterator[str]:
    """A line for each file that is missing."""
    for path in (folder / name for name in sums):
        if not path.is_file():
            yield f"{path} is missing, or {folder / CHECKSUMS} has changed: the checkpoint is damaged"


def read_index(folder: Path, sums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For each kind and parameter its shape and pieces. Raises Fault if they are of another format or lie elsewhere."""
    index = read_json(folder / INDEX)
    if index.get("format_version") not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise Fault(f"{folder}: format {index.get('format_version')}, this version of cpt reads {readable}")
    tensors = index["tensors"]
    files = {piece[2] for of_kind in tensors.values() for tensor in of_kind.values() for piece in tensor["pieces"]}
    for name in sorted(files - set(sums)):
        raise Fault(f"{folder / CHECKSUMS} does not name {name}: the checkpoint is damaged")
    return tensors


def damage_of(folder: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> list[str]:
    """A line for everything that is wrong with a checkpoint; none if it is whole, and then it can be read."""
    try:
        sums = read_checksums(folder)
        if found := list(damaged_files(folder, sums, advance)):
            return found
        read_json(folder / STATE)
        tensors = read_index(folder, sums)
    except Fault as fault:
        return fault.lines
    return [f"{folder / INDEX}: {line}" for line in _contradictions(tensors)] + [
        f"{folder / file}: {line}" for file in sorted(sums) if file not in (INDEX, STATE)
        for line in _missing_pieces(folder / file, file, tensors)
    ]  # fmt: skip


def _contradictions(tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Elements that are not there exactly once, and parameters that one kind has and another has not."""
    shapes = {name: tensor["shape"] for name, tensor in tensors.get("master", {}).items()}
    if not shapes:
        yield "there are no weights"
    for kind, of_kind in tensors.items():
        for name in sorted(shapes.keys() ^ of_kind.keys()):
            yield f"{kind} of {name} is {'missing' if name in shapes else 'there, and no weights of that name'}"
        for name, tensor in of_kind.items():
            if tensor["shape"] != shapes.get(name, tensor["shape"]):
                yield f"{kind} of {name} is {tensor['shape']}, its weights are {shapes[name]}"
            elif not _is_covered_once(tensor):
                yield f"{kind} of {name}: its pieces do not hold every element exactly once"


def _is_covered_once(tensor: Mapping[str, Any]) -> bool:
    shape, of_columns = tensor["shape"], {}
    for start, stop, _file, _key, *columns in tensor["pieces"]:
        of_columns.setdefault(tuple(columns[0]) if columns else None, []).append((start, stop))
    if None in of_columns:
        return len(of_columns) == 1 and _are_tiles(of_columns[None], math.prod(shape))
    return _are_tiles(of_columns, shape[1]) and all(
        _are_tiles(pieces, shape[0] * (stop - start)) for (start, stop), pieces in of_columns.items()
    )


def _are_tiles(stretches: Iterable[tuple[int, int]], number: int) -> bool:
    """Whether they lie one behind another from 0 to `number`."""
    end = 0
    for start, stop in sorted(stretches):
        if start != end or stop <= start:
            return False
        end = stop
    return end == number


def _missing_pieces(path: Path, file: str, tensors: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the index says is in a file, and is not, or not as long."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            lengths = {key: math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        yield f"cannot be read: {error}"
        return
    for of_kind in tensors.values():
        for tensor in of_kind.values():
            for start, stop, where, key, *_ in tensor["pieces"]:
                if where == file and lengths.get(key) != stop - start:
                    yield f"{key} has {lengths.get(key, 'no')} elements, the index says {stop - start}"
