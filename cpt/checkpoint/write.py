"""Write a checkpoint: every rank its own pieces, by name, aside; then one rename.

    step-00000500/
        index.json                  for each kind and parameter: shape, and which file holds which elements
        pieces-00000.safetensors    what rank 0 owned: "master|blocks.0.norm.weight|0" -> elements from 0 on, flattened
        state.json                  progress, ledger, optimiser updates, numbers of the methods
        checksums.json              XXH3-128 of every other file; written last

A kind is `master`, `exp_avg`, `exp_avg_sq` or `method/NAME/KEY`. A piece with `columns` holds elements of these columns
of the parameter alone, counted as if there were no others. Nothing here depends on how many ranks there were.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Piece

# 1 had no columns, and is read as well.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return checkpoints / f"step-{step:08d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints that lie there, whole or not, by step; a folder with a name of its own is somebody else's."""
    steps = {folder: folder.name.removeprefix("step-") for folder in checkpoints.glob("step-*")}
    return sorted((folder for folder, step in steps.items() if step.isdecimal()), key=lambda f: int(steps[f]))


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    tensors: Mapping[str, Sequence[torch.Tensor]],
    state: Mapping[str, Any],
    mesh: Mesh,
) -> None:
    """Write the checkpoint `folder`; every rank must call it with its own pieces.

    `tensors`: for each kind one tensor a piece, in the order of `pieces`. `state`: anything JSON can hold, the same on
    all ranks; the first rank's is written. The folder appears by one rename when everything is on the disk; a folder of
    that name from before is replaced. Raises OSError on every rank if a disk does not take it; then nothing appeared.
    """
    aside = folder.with_name(f".{folder.name}.aside")
    for work in (
        lambda: _make_anew(aside) if mesh.is_first else None,
        lambda: _write_pieces(aside, pieces, tensors, mesh),
        lambda: _finish(aside, folder, state) if mesh.is_first else None,
    ):
        failure = _failure_of(work)
        if mesh.any(failure is not None):  # the ranks that could write must not wait for one that could not
            if mesh.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            raise failure or OSError(f"{folder}: another rank could not write its part of the checkpoint")


def write_first(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fill: Callable[[Path, Mapping[str, str], Callable[[memoryview], object]], None],
    state: Mapping[str, Any],
) -> None:
    """Write the checkpoint `folder` of weights that nothing was trained on yet: masters only, from one process.

    `fill(path, keys, observe)` writes the file of pieces: the whole of each parameter, flattened, under the name
    `keys[name]`. It may do so in pieces, which `write_checkpoint` cannot, and in a type that holds the fp32 masters
    exactly. It calls `observe` with the file's bytes in their order.
    Raises OSError if the disk does not take it; then nothing appeared.
    """
    aside, file = folder.with_name(f".{folder.name}.aside"), "pieces-00000.safetensors"
    keys = {name: f"master|{name}|0" for name in shapes}
    entries = [
        ["master", name, list(shape), 0, math.prod(shape), file, keys[name], None] for name, shape in shapes.items()
    ]
    _make_anew(aside)
    try:
        digest = xxhash.xxh3_128()
        fill(aside / file, keys, digest.update)
        (aside / "index-00000.json").write_text(json.dumps(entries), encoding="utf-8")
        _finish(aside, folder, state, {file: digest.hexdigest()})
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def set_latest(checkpoints: Path, folder: Path) -> None:
    """Let `checkpoints/latest` name `folder`; before this it names the one before."""
    aside = checkpoints / ".latest.aside"
    aside.write_text(folder.name + "\n", encoding="utf-8")
    _to_disk(aside)
    aside.replace(checkpoints / "latest")


def _failure_of(work: Callable[[], None]) -> OSError | None:
    try:
        work()
    except SafetensorError as error:  # what safetensors makes of a full disk
        return OSError(str(error))
    except OSError as error:
        return error
    return None


def _make_anew(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _write_pieces(
    aside: Path, pieces: Sequence[Piece], tensors: Mapping[str, Sequence[torch.Tensor]], mesh: Mesh
) -> None:
    """This rank's file of pieces, and the part of the index that speaks of it."""
    file = f"pieces-{mesh.rank:05d}.safetensors"
    contents, entries = {}, []
    for kind, of_kind in tensors.items():
        for piece, tensor in zip(pieces, of_kind, strict=True):
            if not piece.is_counted:
                continue
            key = f"{kind}|{piece.name}|{piece.start}"
            contents[key] = tensor.detach().contiguous().cpu()
            entries.append([kind, piece.name, list(piece.shape), piece.start, piece.stop, file, key, piece.columns])
    save_file(contents, aside / file)
    _to_disk(aside / file)
    (aside / f"index-{mesh.rank:05d}.json").write_text(json.dumps(entries), encoding="utf-8")


def _finish(aside: Path, folder: Path, state: Mapping[str, Any], known_sums: Mapping[str, str] | None = None) -> None:
    """`known_sums`: checksums of files that need not be read again."""
    index: dict[str, Any] = {"format_version": FORMAT_VERSION, "tensors": {}}
    for part in sorted(aside.glob("index-*.json")):
        for kind, name, shape, start, stop, file, key, columns in json.loads(part.read_text(encoding="utf-8")):
            tensor = index["tensors"].setdefault(kind, {}).setdefault(name, {"shape": shape, "pieces": []})
            tensor["pieces"].append([start, stop, file, key, *([columns] if columns else [])])
        part.unlink()
    for of_kind in index["tensors"].values():
        for tensor in of_kind.values():
            tensor["pieces"].sort()
    (aside / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    known = known_sums or {}
    sums = {path.name: known.get(path.name) or checksum(path) for path in sorted(aside.iterdir())}
    (aside / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for name in ("index.json", "state.json", "checksums.json"):
        _to_disk(aside / name)
    _to_disk(aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.replace(folder)
    _to_disk(folder.parent)


def checksum(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hex; reads in pieces of 4 MiB."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            digest.update(buffer[:num_read])
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Return when the file or folder is on the disk and not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
