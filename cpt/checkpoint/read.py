"""Read a checkpoint on any mesh: each rank maps the files and copies the elements that it owns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpt.checkpoint.damage import (
    INDEX,
    STATE,
    Unreadable,
    damaged_files,
    missing_files,
    read_checksums,
    read_index,
    read_json,
)
from cpt.checkpoint.write import checkpoint_folders, step_folder
from cpt.config import Fault
from cpt.parallel.mesh import ALONE, Mesh

_log = logging.getLogger(__name__)

_NUM_MISFITS_TOLD = 8


class Checkpoint:
    """One checkpoint, opened and found whole: every file is there and has its checksum.

    `check`: also those that hold the pieces; else those alone that are read here, and the others are there.
    `share`: of the files, by name, those whose checksum is looked at here, because other ranks look at the others.
    Raises Fault naming the first file that is missing or damaged; passing, if the disk does not give it.

    `unread`: what was told of each later checkpoint that the disk does not give, and which may be whole; from
    `find_checkpoint`.
    """

    def __init__(self, folder: Path, check: bool = True, share: slice = slice(None)) -> None:
        self.folder = folder
        sums = read_checksums(folder)
        for line in damaged_files(folder, sums, share=share) if check else _damage_at_first_sight(folder, sums):
            raise Fault(line, is_passing=isinstance(line, Unreadable))
        self._tensors = read_index(folder, sums)
        self.state: dict[str, Any] = read_json(folder / STATE)
        self._open: dict[str, Any] = {}
        self.unread: dict[Path, list[str]] = {}

    @property
    def kinds(self) -> list[str]:
        """What is held for each parameter: `master`, `exp_avg`, `exp_avg_sq`, `method/NAME/KEY`."""
        return sorted(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return {name: tuple(tensor["shape"]) for name, tensor in self._tensors["master"].items()}

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One line for each parameter that is only here, only among these, or has another shape; the first few."""
        here = self.shapes
        faults = [
            f"{self.folder}: {name} is {list(here[name]) if name in here else 'missing'}, "
            f"the model {f'wants {list(shapes[name])}' if name in shapes else 'has none'}; "
            "give the model settings of the run that the checkpoint is from, or leave them out"
            for name in {**shapes, **here}
            if here.get(name) != shapes.get(name)
        ]
        rest = len(faults) - _NUM_MISFITS_TOLD
        return faults if rest <= 0 else [*faults[:_NUM_MISFITS_TOLD], f"... and {rest} more of this kind"]

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` of a parameter, flattened: [stop - start], on the CPU.

        Raises Fault if the pieces do not cover them.
        """
        tensor = self._tensors[kind][name]
        stop = math.prod(tensor["shape"]) if stop is None else stop
        if self.is_in_columns(kind, name):
            width = tensor["shape"][1]
            row, stop_row = start // width, -(-stop // width)
            return self._read_rows(kind, name, row, stop_row)[start - row * width : stop - row * width]
        out = torch.empty(stop - start, dtype=torch.float32)
        num_copied = 0
        for first, last, file, key in tensor["pieces"]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                out[low - start : high - start] = self._file(file).get_slice(key)[low - first : high - first]
                num_copied += high - low
        self._refuse_gaps(kind, name, num_copied, len(out))
        return out

    def is_in_columns(self, kind: str, name: str) -> bool:
        """Whether some piece of a parameter holds some of its columns only, because a tensor group wrote it."""
        return any(len(piece) > 4 for piece in self._tensors[kind][name]["pieces"])

    def _read_rows(self, kind: str, name: str, row: int, stop_row: int) -> torch.Tensor:
        """The rows of a matrix, flattened, from pieces of columns."""
        tensor = self._tensors[kind][name]
        rows = torch.empty(stop_row - row, tensor["shape"][1], dtype=torch.float32)
        num_copied = 0
        for first, last, file, key, (column, stop_column) in tensor["pieces"]:
            width = stop_column - column
            low, high = max(first, row * width), min(last, stop_row * width)
            if low < high:
                here = rows[:, column:stop_column]
                # A copy, because a piece may begin and end within a row.
                filled = here.clone(memory_format=torch.contiguous_format).view(-1)
                filled[low - row * width : high - row * width] = self._file(file).get_slice(key)[
                    low - first : high - first
                ]
                here.copy_(filled.view(here.shape))
                num_copied += high - low
        self._refuse_gaps(kind, name, num_copied, rows.numel())
        return rows.reshape(-1)

    def _refuse_gaps(self, kind: str, name: str, num_copied: int, number: int) -> None:
        if num_copied != number:
            raise Fault(f"{self.folder}: {kind} of {name} has {num_copied} of the {number} elements asked for")

    def places(self, kind: str, name: str) -> list[tuple[int, int, Path, str]]:
        """(first element, last + 1, file, name in the file) of each piece of a parameter, by first element.

        For a reader of its own, which holds less in memory than `read`; not of what `is_in_columns`. Raises Fault if
        pieces are missing.
        """
        tensor = self._tensors[kind][name]
        stop = 0
        for first, last, *_ in tensor["pieces"]:
            if first != stop:
                break
            stop = last
        if stop != math.prod(tensor["shape"]):
            raise Fault(f"{self.folder}: {kind} of {name} lacks the elements from {stop} on")
        return [(first, last, self.folder / file, key) for first, last, file, key in tensor["pieces"]]

    def close(self) -> None:
        """Let go of the files, so that the disk gets their room back when they are removed; reading opens them anew."""
        self._open.clear()

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by name, each in its own shape, all in memory."""
        return {name: self.read("master", name).reshape(shape) for name, shape in self.shapes.items()}

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise Fault(f"{self.folder / name} cannot be read: {error}") from None
        return self._open[name]


def _damage_at_first_sight(folder: Path, sums: Mapping[str, str]) -> Iterator[str]:
    """A line for each file that is missing, and for each of those of names and values that has changed."""
    yield from missing_files(folder, sums)
    yield from damaged_files(folder, {name: sums[name] for name in (INDEX, STATE)})


def find_checkpoint(
    checkpoints: Path, at: str | int = "latest", check: bool = True, mesh: Mesh = ALONE, up_to: int | None = None
) -> Checkpoint | None:
    """The checkpoint that `at` names: a step, or the newest one that is whole; the same on all ranks; all call it.

    The first rank says which there are; each rank looks through some of the files. A damaged one is told loudly and the
    one before it is taken. None if the folder holds none at all. Raises Fault on all ranks if that step is not there or
    is damaged, or if every checkpoint is; passing, if the disk does not give one of them, which may be whole;
    the one that is taken names such ones in `unread`. `up_to`: as if those of later steps were not there.
    """
    there = mesh.from_first([int(folder.name.removeprefix("step-")) for folder in checkpoint_folders(checkpoints)])
    there = [step for step in there if up_to is None or step <= up_to]
    if at != "latest" and int(at) not in there:
        told = ", ".join(map(str, there)) or "none"
        raise Fault(f"{checkpoints}: there is no checkpoint at step {at}; there are: {told}")
    damage: list[str] = []
    unread: dict[Path, list[str]] = {}
    for step in reversed(there if at == "latest" else [int(at)]):
        folder = step_folder(checkpoints, step)
        checkpoint, lines, is_unreadable = _opened(folder, check, mesh)
        if not lines:
            checkpoint.unread = unread
            return checkpoint
        damage += lines
        if is_unreadable:
            unread[folder] = lines
        if at == "latest":
            _log.warning("%s; trying the one before", "; ".join(lines))
    if not damage:
        return None
    said = [f"{checkpoints}: no checkpoint is whole"] if at == "latest" else []
    raise Fault([*said, *damage], is_passing=bool(unread))


def _opened(folder: Path, check: bool, mesh: Mesh) -> tuple[Checkpoint | None, list[str], bool]:
    """A checkpoint, or what some rank finds wrong with it, and whether a disk is all that is: the same on all.

    So it is if some rank cannot read a file, and none finds another missing or changed.
    """
    checkpoint, fault, is_unreadable = None, "", False
    try:
        checkpoint = Checkpoint(folder, check, slice(mesh.rank, None, mesh.size))
    except Fault as error:
        fault, is_unreadable = "\n".join(error.lines), error.is_passing
    except OSError as error:
        fault, is_unreadable = f"{error.filename or folder} cannot be read: {error.strerror or error}", True
    said = dict.fromkeys(line for text in mesh.texts(fault) for line in text.splitlines())
    is_damaged = mesh.any(bool(fault) and not is_unreadable)
    return checkpoint, list(said), mesh.any(is_unreadable) and not is_damaged
