"""Writes safetensors files in pieces, past the page cache: no file and no tensor is ever in memory as a whole.

    8 bytes, how long the header is | header: JSON, filled up with spaces | the tensors' bytes, one after another

The library writes only what is in memory as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
# Of what cannot be put straight where it is written from.
ELEMENTS_A_PIECE = 1 << 20
_BLOCK_BYTES = 4 << 20  # no less: see `memory_for`
# What is written past the page cache is written in multiples of this.
_DISK_BLOCK = 4096


@dataclass(frozen=True)
class Layout:
    """What a file holds: its header word for word, and for each tensor type, shape, and first byte in the file."""

    header: str
    places: Mapping[str, tuple[str, tuple[int, ...], int]]

    @staticmethod
    def of_header(header: str) -> Layout:
        """The layout that a header describes."""
        begin = 8 + len(header.encode())
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        return Layout(
            header,
            {
                name: (tensor["dtype"], tuple(tensor["shape"]), begin + tensor["data_offsets"][0])
                for name, tensor in tensors.items()
            },
        )

    @staticmethod
    def of_tensors(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
        """A new file of these, byte for byte as the library would lay it out: large types first, then by name."""
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            content[name] = {
                "dtype": NAMES_OF_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        return Layout.of_header(header + " " * (-len(header.encode()) % 8))

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        ends = (begin + _num_bytes(dtype, shape) for dtype, shape, begin in self.places.values())
        return max(ends, default=8 + len(self.header.encode()))


class Writer:
    """A new file with a layout, filled from its first tensor to its last; on the disk at the end of the block.

    Past the page cache where the file system can do that: on a machine without room to spare the cache took 0.9 to 4.7
    seconds of processor time for 2.2 GB, where the disk itself took 1.3 seconds of nobody's. Raises OSError for what
    the disk does not take. `observe`: called with the file's bytes, block by block. Two blocks are in memory.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        observe: Callable[[memoryview], object] = lambda block: None,
    ) -> None:
        self._layout, self._path, self._observe = layout, path, observe
        self._names = iter(in_order(layout))
        self._blocks = [memory_for(_BLOCK_BYTES) for _ in range(2)]  # one is filled while the other is written
        self._filled = self._num_written = 0
        self._writing: Future | None = None

    def __enter__(self) -> Writer:
        self._thread = ThreadPoolExecutor(1)
        self._file, self._is_direct = _open_to_write(self._path)
        header = self._layout.header.encode()
        self._append(torch.frombuffer(bytearray(len(header).to_bytes(8, "little") + header), dtype=torch.uint8))
        return self

    def write(self, name: str, read_into: Callable[[int, Tensor], None]) -> None:
        """The tensor `name`, the next in the file; `read_into(start, out)` fills `out` with those from `start` on."""
        stored_as, shape, begin = self._layout.places[name]
        assert name == next(self._names) and begin == self._begin
        dtype, start, num_elements = DTYPES[stored_as], 0, math.prod(shape)
        while start < num_elements:
            # A file that others wrote may hold a type where it is not aligned.
            if self._filled % dtype.itemsize:
                out = torch.empty(min(num_elements - start, ELEMENTS_A_PIECE), dtype=dtype)
                read_into(start, out)
                self._append(out.view(torch.uint8))
            else:
                num_fitting = (_BLOCK_BYTES - self._filled) // dtype.itemsize
                end = self._filled + min(num_elements - start, num_fitting) * dtype.itemsize
                out = self._blocks[0][self._filled : end].view(dtype)
                read_into(start, out)
                self._take(len(out) * dtype.itemsize)
            start += len(out)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._hand_over()
                self._wait()
                assert self._num_written == self._layout.num_bytes
                os.ftruncate(self._file, self._num_written)  # written in whole disk blocks
                os.fsync(self._file)
        finally:
            self._thread.shutdown()
            os.close(self._file)

    @property
    def _begin(self) -> int:
        return self._num_written + self._filled

    def _append(self, raw: Tensor) -> None:
        while len(raw):
            num_bytes = min(len(raw), _BLOCK_BYTES - self._filled)
            self._blocks[0][self._filled : self._filled + num_bytes] = raw[:num_bytes]
            self._take(num_bytes)
            raw = raw[num_bytes:]

    def _take(self, num_bytes: int) -> None:
        self._filled += num_bytes
        if self._filled == _BLOCK_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the thread write the block that is filled, and go on in the other."""
        block = memoryview(self._blocks[0].numpy())
        self._observe(block[: self._filled])  # while the thread still writes the block before
        self._wait()
        self._writing = self._thread.submit(self._write_block, block, self._filled, self._num_written)
        self._num_written, self._filled = self._begin, 0
        self._blocks.reverse()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_block(self, block: memoryview, num_bytes: int, begin: int) -> None:
        end = _rounded(num_bytes) if self._is_direct else num_bytes
        _write_at(self._path, self._file, block[:end], begin)


def memory_for(num_bytes: int, is_pinned: bool = False) -> Tensor:
    """Memory, uint8, that the disk can take a file or a block of it from: it begins and ends where a disk's block may.

    From 4 MiB on NumPy asks for huge pages. Memory of small ones goes to the disk in as many pieces: a virtual disk
    took 1.2 to 1.6 GB/s from it, and 1.9 to 2.2 from huge ones, in blocks of 2 to 8 MiB.
    `is_pinned`: for a GPU; where the system does not allow that much, a warning, and it is as any other.
    """
    whole = np.empty(_rounded(num_bytes) + _DISK_BLOCK, dtype=np.uint8)
    memory = torch.from_numpy(whole[-whole.ctypes.data % _DISK_BLOCK :][: _rounded(num_bytes)])
    if is_pinned:
        _pin(memory, whole)
    return memory


def _pin(memory: Tensor, owner: np.ndarray) -> None:
    """Pin `memory` where it is until `owner`, which it lies in, is freed.

    Not torch's pin_memory: its allocator takes the next power of two, up to twice as much, and never gives it back.
    """
    address, runtime = memory.data_ptr(), torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(address, len(memory), 0))
    if not error:
        weakref.finalize(owner, runtime.cudaHostUnregister, address)
        return
    _log.warning(
        "%.1f GB of host memory could not be pinned (CUDA error %d); copies of the GPU's memory are slower",
        len(memory) / 1e9, error,
    )  # fmt: skip
    with contextlib.suppress(RuntimeError):  # CUDA would tell the error once more, to whoever comes next
        torch.ones((), device="cuda")


def fill(memory: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Make the beginning of `memory` the file that holds `tensors`. From a GPU to pinned memory: wait for the GPU."""
    header = layout.header.encode()
    start = len(header).to_bytes(8, "little") + header
    memory[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
    for key, tensor in tensors.items():
        begin = layout.places[key][2]
        place = memory[begin : begin + tensor.nbytes].view(tensor.dtype)
        if tensor.device.type == "cpu":
            reading(tensor)(0, place)
        else:
            place.copy_(tensor.reshape(-1), non_blocking=True)


def write_whole(
    path: Path, memory: Tensor, num_bytes: int, observe: Callable[[memoryview], object] = lambda block: None
) -> None:
    """Write the first `num_bytes` of `memory`, which `memory_for` gave, as a new file; on the disk at the end.

    From one thread and without a copy, so that it need not wait for another thread where all cores are at work.
    """
    file, is_direct = _open_to_write(path)
    try:
        raw = memoryview(memory.numpy())
        for begin in range(0, num_bytes, _BLOCK_BYTES):
            end = min(begin + _BLOCK_BYTES, num_bytes)
            observe(raw[begin:end])
            _write_at(path, file, raw[begin : _rounded(end) if is_direct else end], begin)
        os.ftruncate(file, num_bytes)
        os.fsync(file)
    finally:
        os.close(file)


def reading(tensor: Tensor) -> Callable[[int, Tensor], None]:
    """What `Writer.write` takes for a tensor in memory, or on a device; one thread copies."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type != "cpu":
        return lambda start, out: out.copy_(flat[start : start + len(out)])
    source = flat.view(torch.uint8).numpy()

    def read_into(start: int, out: Tensor) -> None:
        # Not torch's copy_: it takes as many threads as there are cores, and where others work beside them it was
        # found to wait for its own threads, 0.1 to 0.5 s for what one of them copies in 0.03 s.
        first = start * flat.itemsize
        np.copyto(out.view(torch.uint8).numpy(), source[first : first + out.nbytes])

    return read_into


def in_order(layout: Layout) -> list[str]:
    """The names of the tensors as they lie in the file."""
    return sorted(layout.places, key=lambda name: layout.places[name][2])


def _rounded(num_bytes: int) -> int:
    """Up to whole blocks of a disk."""
    return -(-num_bytes // _DISK_BLOCK) * _DISK_BLOCK


def _write_at(path: Path, file: int, left: memoryview, begin: int) -> None:
    try:
        while left:
            num_written = os.pwrite(file, left, begin)
            begin, left = begin + num_written, left[num_written:]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _open_to_write(path: Path) -> tuple[int, bool]:
    """(the file, whether it is written past the page cache)."""
    flags = os.O_CREAT | os.O_WRONLY
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666), False


def _num_bytes(stored_as: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[stored_as].itemsize
