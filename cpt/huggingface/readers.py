"""A tensor that is read in pieces, wherever it lies: what export, import and comparison have in common.

for start, piece in pieces(Cast(stored, torch.bfloat16)):    # never more than a few MiB at a time
    ...
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Weight = Tensor | Callable[[], Tensor]

# A few of them fit the processor's caches together: 1 MiB and 16 MiB are both slower.
ELEMENTS_A_PIECE = 1 << 21


class Reader(ABC):
    """One tensor of `shape` and `dtype`; its elements are counted as if it were flat."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read_into(self, start: int, out: Tensor) -> None:
        """Fill `out` [elements], of its type and on the CPU, with the elements from `start` on."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`: [stop - start]; not to be written to."""
        out = torch.empty(stop - start, dtype=self.dtype)
        self.read_into(start, out)
        return out


class InMemory(Reader):
    """A tensor that is there."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self._flat = tensor.detach().cpu().reshape(-1)

    def read_into(self, start: int, out: Tensor) -> None:
        """A copy."""
        out.copy_(self._flat[start : start + len(out)])

    def read(self, start: int, stop: int) -> Tensor:
        """A view of it."""
        return self._flat[start:stop]


class Joined(Reader):
    """Several tensors of equal shape and type as one, their rows in turn; see `architectures.Stored`."""

    def __init__(self, parts: Sequence[Reader], rows: int) -> None:
        first = parts[0]
        self.shape, self.dtype = (len(parts) * first.shape[0], *first.shape[1:]), first.dtype
        self._parts, self._block = parts, rows * math.prod(first.shape[1:])

    def read_into(self, start: int, out: Tensor) -> None:
        """The blocks of rows that lie there, one after the other."""
        for low, high in _cut(start, start + len(out), self._block):
            turn, number = divmod(low // self._block, len(self._parts))
            self._parts[number].read_into(turn * self._block + low % self._block, out[low - start : high - start])


class Part(Reader):
    """Number `number` of the `num_parts` tensors that were joined into another; the other way of `Joined`."""

    def __init__(self, joined: Reader, num_parts: int, number: int, rows: int) -> None:
        self.shape, self.dtype = (joined.shape[0] // num_parts, *joined.shape[1:]), joined.dtype
        self._joined, self._num_parts, self._number = joined, num_parts, number
        self._block = rows * math.prod(joined.shape[1:])

    def read_into(self, start: int, out: Tensor) -> None:
        """The blocks of rows that lie there, one after the other."""
        for low, high in _cut(start, start + len(out), self._block):
            block = low // self._block * self._num_parts + self._number
            self._joined.read_into(block * self._block + low % self._block, out[low - start : high - start])


class Cast(Reader):
    """Another tensor in the type `dtype`."""

    def __init__(self, reader: Reader, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self._reader = reader.shape, dtype, reader

    def read_into(self, start: int, out: Tensor) -> None:
        """Straight from the other, if the type is the same already."""
        if self._reader.dtype is self.dtype:
            self._reader.read_into(start, out)
        else:
            out.copy_(self._reader.read(start, start + len(out)))

    def read(self, start: int, stop: int) -> Tensor:
        """What the other reads, if the type is the same already."""
        return self._reader.read(start, stop).to(self.dtype)


class Chained(Reader):
    """A tensor that lies in parts, one behind the other: [(first element, last + 1, the reader of the part)]."""

    def __init__(self, shape: tuple[int, ...], parts: Sequence[tuple[int, int, Reader]]) -> None:
        self.shape, self.dtype, self._parts = tuple(shape), parts[0][2].dtype, parts

    def read_into(self, start: int, out: Tensor) -> None:
        """From each part what it has of them."""
        for first, last, reader in self._parts:
            low, high = max(first, start), min(last, start + len(out))
            if low < high:
                reader.read_into(low - first, out[low - start : high - start])


class FirstRows(Reader):
    """The first `num_rows` of another tensor."""

    def __init__(self, reader: Reader, num_rows: int) -> None:
        self.shape, self.dtype, self._reader = (num_rows, *reader.shape[1:]), reader.dtype, reader

    def read_into(self, start: int, out: Tensor) -> None:
        """What the other one reads: the rows before lie where they lay."""
        self._reader.read_into(start, out)


def reader_of(weights: Mapping[str, Weight], name: str) -> Reader:
    """How to read the weight `name` in pieces, if the mapping can; else it is fetched whole."""
    if hasattr(weights, "reader"):
        return weights.reader(name)
    return InMemory(fetch(weights, name))


def fetch(weights: Mapping[str, Weight], name: str) -> Tensor:
    """The weight itself, whether it lies there or is fetched; on the CPU."""
    weight = weights[name]
    return (weight if isinstance(weight, Tensor) else weight()).detach().cpu()


def pieces(reader: Reader) -> Iterator[tuple[int, Tensor]]:
    """(first element, piece) from the first element to the last."""
    for start, stop in _cut(0, math.prod(reader.shape), ELEMENTS_A_PIECE):
        yield start, reader.read(start, stop)


def _cut(start: int, stop: int, block: int) -> Iterator[tuple[int, int]]:
    """The range cut at every multiple of `block`."""
    while start < stop:
        end = min(stop, (start // block + 1) * block)
        yield start, end
        start = end


def whole(reader: Reader) -> Tensor:
    """All of it in its own shape, in memory of its own."""
    out = torch.empty(math.prod(reader.shape), dtype=reader.dtype)
    for start, stop in _cut(0, len(out), ELEMENTS_A_PIECE):
        reader.read_into(start, out[start:stop])
    return out.view(reader.shape)


def difference_of(expected: Reader, found: Reader, observe: Callable[[Tensor], object] = lambda raw: None) -> str:
    """What differs between two tensors, to the bit, in a few words; empty if nothing does.

    `observe` is called with the bytes of `found`, piece by piece, if shapes and types agree.
    """
    if expected.shape != found.shape:
        return f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{name_of_dtype(found.dtype)} in place of {name_of_dtype(expected.dtype)}"
    num_different, first = 0, ""
    for start, right in pieces(expected):
        other = found.read(start, start + len(right))
        raw = _bits(right), _bits(other)
        observe(raw[1])
        if torch.equal(*raw):
            continue
        differs = (raw[0] != raw[1]).view(len(right), -1).any(dim=-1)
        if not num_different:
            index = int(differs.nonzero()[0])
            place = [int(number) for number in np.unravel_index(start + index, expected.shape)]
            first = f"{place}: {other[index].item():.6g} in place of {right[index].item():.6g}"
        num_different += int(differs.sum())
    if not num_different:
        return ""
    return f"{num_different} of {math.prod(expected.shape)} values differ, the first at {first}"


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def name_of_dtype(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def count_not_finite(values: Tensor) -> int:
    """How many of the values are NaN or infinite."""
    # aminmax keeps NaN, and is twenty times as fast as isfinite.
    if not values.numel() or all(math.isfinite(extreme.item()) for extreme in values.aminmax()):
        return 0
    return int((~values.isfinite()).sum())
