"""What a checkpoint is on the disk, and how its parts are written: every rank its own pieces, aside; then one rename.

    step-00000500/
        index.json                  for each kind and parameter: shape, and which file holds which elements
        pieces-00000.safetensors    what rank 0 owned: "master|blocks.0.norm.weight|0" -> elements from 0 on, flattened
        state.json                  progress, ledger, optimiser updates, numbers of the methods
        checksums.json              XXH3-128 of every other file; written last

A kind is `master`, `exp_avg`, `exp_avg_sq` or `method/NAME/KEY`. A piece with `columns` holds elements of these columns
of the parameter alone, counted as if there were no others. Nothing here depends on how many ranks there were.

Who waits for whom is told in `cpt.checkpoint.save`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from cpt.parallel.weights import Piece
from cpt.tensor_writer import Layout, Writer, in_order, reading, write_whole

# 1 had no columns, and is read as well.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
# Ends the name that a checkpoint has while the same step, saved again, is put in its place.
_OLD = ".old.aside"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints that lie there, whole or not, by step; a folder with a name of its own is somebody else's."""
    found = (folder for folder in checkpoints.glob("step-*") if folder.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of)


def aside_of(folder: Path) -> Path:
    """Where the checkpoint `folder` is written until it is whole."""
    return folder.with_name(f".{folder.name}.aside")


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds. `tensors`: for each kind one tensor a piece, in the order of `pieces`.

    `state`: anything JSON can hold, the same on all ranks; the first rank's is written.
    """

    pieces: Sequence[Piece]
    tensors: Mapping[str, Sequence[torch.Tensor]]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What one rank writes: tensors by their names in its file, and a line of the index for each."""

    rank: int
    tensors: Mapping[str, torch.Tensor]
    entries: Sequence[list[Any]]

    @staticmethod
    def of_rank(rank: int, content: Content) -> Part:
        """The pieces that are this rank's to write; the tensors are views."""
        tensors, entries = {}, []
        for kind, of_kind in content.tensors.items():
            for piece, tensor in zip(content.pieces, of_kind, strict=True):
                if not piece.is_counted:
                    continue
                key = f"{kind}|{piece.name}|{piece.start}"
                tensors[key] = tensor.detach()
                entries.append(
                    [kind, piece.name, list(piece.shape), piece.start, piece.stop, _file(rank), key, piece.columns]
                )
        return Part(rank, tensors, entries)

    @cached_property
    def layout(self) -> Layout:
        """Of its file."""
        return Layout.of_tensors({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in self.tensors.items()})

    def write(self, aside: Path, image: torch.Tensor | None = None) -> None:
        """Write the file and this rank's part of the index into the folder `aside`, and onto the disk.

        `image`: memory that `fill` made the file; else the tensors are read, and must not change meanwhile.
        """
        path, digest = aside / _file(self.rank), xxhash.xxh3_128()
        if image is not None:
            write_whole(path, image, self.layout.num_bytes, digest.update)
        else:
            with Writer(path, self.layout, digest.update) as writer:
                for key in in_order(self.layout):
                    writer.write(key, reading(self.tensors[key]))
        _write_part_of_index(aside, self.rank, self.entries, digest.hexdigest())


def write_first(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fill: Callable[[Path, Mapping[str, str], Callable[[memoryview], object]], None],
    state: Mapping[str, Any],
) -> None:
    """Write the checkpoint `folder` of weights that nothing was trained on yet: masters only, from one process.

    `fill(path, keys, observe)` writes the file of pieces: the whole of each parameter, flattened, under the name
    `keys[name]`. It may do so in a type that holds the fp32 masters exactly. It calls `observe` with the file's bytes
    in their order.
    Raises OSError if the disk does not take it.
    """
    aside, file = aside_of(folder), _file(0)
    keys = {name: f"master|{name}|0" for name in shapes}
    entries = [
        ["master", name, list(shape), 0, math.prod(shape), file, keys[name], None] for name, shape in shapes.items()
    ]
    make_anew(aside)
    try:
        digest = xxhash.xxh3_128()
        fill(aside / file, keys, digest.update)
        _write_part_of_index(aside, 0, entries, digest.hexdigest())
        join_parts(aside, folder, state, 1)
        make_lasting(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_anew(aside: Path, num_bytes: int = 0) -> None:
    """Make the folder `aside`, empty, and remove what killed saves left beside it.

    Raises OSError if the disk has no room for `num_bytes`; then nothing was written.
    """
    aside.parent.mkdir(parents=True, exist_ok=True)
    give_names_back(aside.parent)
    for left in aside.parent.glob(".step-*.aside"):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(aside.parent).free
    if free < num_bytes:
        told = f"{num_bytes:,} bytes are needed and {free:,} are free on this disk; nothing was written"
        raise OSError(errno.ENOSPC, told, str(aside.parent))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def join_parts(aside: Path, folder: Path, state: Mapping[str, Any], num_parts: int) -> None:
    """Make one checkpoint of what `num_parts` ranks have written into `aside`, and let it appear as `folder`.

    Raises OSError if the disk does not take it; then nothing appeared.
    """
    index: dict[str, Any] = {"format_version": FORMAT_VERSION, "tensors": {}}
    sums = {}
    for rank in range(num_parts):
        path = aside / _part_of_index(rank)
        part = json.loads(path.read_text(encoding="utf-8"))
        if (aside / _file(rank)).stat().st_size != part["num_bytes"]:
            raise OSError(errno.EIO, "changed while the checkpoint was written", str(aside / _file(rank)))
        sums[_file(rank)] = part["checksum"]
        for kind, name, shape, start, stop, file, key, columns in part["entries"]:
            tensor = index["tensors"].setdefault(kind, {}).setdefault(name, {"shape": shape, "pieces": []})
            tensor["pieces"].append([start, stop, file, key, *([columns] if columns else [])])
        path.unlink()
    for of_kind in index["tensors"].values():
        for tensor in of_kind.values():
            tensor["pieces"].sort()
    for name, text in (("index.json", json.dumps(index)), ("state.json", json.dumps(state, indent=1))):
        (aside / name).write_text(text, encoding="utf-8")
        sums[name] = xxhash.xxh3_128(text.encode()).hexdigest()
    (aside / "checksums.json").write_text(json.dumps(dict(sorted(sums.items())), indent=1), encoding="utf-8")
    for name in ("index.json", "state.json", "checksums.json"):
        _to_disk(aside / name)
    _to_disk(aside)
    _put_in_place(aside, folder)


def make_lasting(folder: Path) -> None:
    """Let the checkpoint that has just appeared outlast a power cut, and one that had its name go.

    Raises OSError if the disk refuses; the checkpoint is there all the same.
    """
    _to_disk(folder.parent)
    shutil.rmtree(_old_of(folder), ignore_errors=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`, and before that one that is there, because it may be the newest whole one.

    Killed between the two renames, neither has the name: `give_names_back` is for that.
    """
    old = _old_of(folder)
    if folder.exists():
        folder.replace(old)
    try:
        aside.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise


def _old_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_OLD}")


def give_names_back(checkpoints: Path) -> None:
    """Let a checkpoint that a save has moved away, and was killed before the new one had its name, have it again.

    Only for a process that has taken the run's folder: in another the save may still be between its renames.
    """
    for old in checkpoints.glob(f".step-*{_OLD}"):
        folder = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(folder)


def has_lost_names(checkpoints: Path) -> bool:
    """Whether a save has moved a checkpoint away that is still there."""
    return any(checkpoints.glob(f".step-*{_OLD}"))


def set_latest(checkpoints: Path, folder: Path) -> None:
    """Let `checkpoints/latest` name `folder`; before this it names the one before."""
    aside = checkpoints / ".latest.aside"
    aside.write_text(folder.name + "\n", encoding="utf-8")
    _to_disk(aside)
    aside.replace(checkpoints / "latest")


def checksum(path: Path, advance: Callable[[int], object] = lambda num_bytes: None) -> str:
    """XXH3-128 of a file's bytes, in hex; reads in pieces of 4 MiB, and tells `advance` the length of each."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            digest.update(buffer[:num_read])
            advance(num_read)
    return digest.hexdigest()


def _file(rank: int) -> str:
    return f"pieces-{rank:05d}.safetensors"


def _part_of_index(rank: int) -> str:
    return f"index-{rank:05d}.json"


def _write_part_of_index(aside: Path, rank: int, entries: Sequence[list[Any]], digest: str) -> None:
    num_bytes = (aside / _file(rank)).stat().st_size
    part = {"num_bytes": num_bytes, "checksum": digest, "entries": entries}
    (aside / _part_of_index(rank)).write_text(json.dumps(part), encoding="utf-8")


def _to_disk(path: Path) -> None:
    """Return when the file or folder is on the disk and not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)
