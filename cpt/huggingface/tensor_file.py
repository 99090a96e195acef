"""safetensors files read in pieces: no file and no tensor is ever in memory as a whole.

The library checks a file when it is opened. It is not what reads: it maps a file into memory, and every page that was
touched counts as ours until it is closed.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpt.config.faults import Fault
from cpt.huggingface.readers import Reader
from cpt.tensor_writer import DTYPES, Layout


class StoredTensor(Reader):
    """One tensor of a file. `stored_as`: its type as the header has it, which may be none of ours."""

    def __init__(self, path: Path, stored_as: str, shape: tuple[int, ...], begin: int) -> None:
        self.path, self.stored_as, self.shape = path, stored_as, shape
        self._begin = begin

    @property
    def dtype(self) -> torch.dtype:
        """Its type; KeyError if that is none of ours."""
        return DTYPES[self.stored_as]

    def read_into(self, start: int, out: Tensor) -> None:
        """From the file straight to where they are wanted."""
        _read_into(out.view(torch.uint8), self.path, self._begin + start * self.dtype.itemsize)


def open_file(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """(every tensor of a file by name, the file's header). Raises Fault if the file is damaged."""
    try:
        with safe_open(path, framework="pt"):  # finds it whole, and its header without contradictions
            pass
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little")).decode()
    except (SafetensorError, OSError) as error:
        raise Fault(f"{path} is damaged: {error}") from None
    places = Layout.of_header(header).places
    return {name: StoredTensor(path, *place) for name, place in places.items()}, header


def _read_into(buffer: Tensor, path: Path, begin: int) -> None:
    left = memoryview(buffer.numpy())
    try:
        with path.open("rb", buffering=0) as file:
            while left:
                num_read = os.preadv(file.fileno(), [left], begin)
                if not num_read:
                    raise Fault(f"{path} ends at byte {begin}, before its tensors do: it was changed meanwhile")
                begin, left = begin + num_read, left[num_read:]
    except OSError as error:
        raise Fault(f"{path} cannot be read: {error.strerror}") from None
