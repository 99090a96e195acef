"""What it takes until the first sample of a shuffled order can be named: CPU time, and bytes kept for it."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt.benchmarks.measure import Spread
from cpt.benchmarks.ours import order_of
from cpt.data.megatron_index import pack_header

_DOCUMENT_TOKENS = 1_000
_ENTRIES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class StartUp:
    """CPU milliseconds to make one library's order ready, and the bytes of the index that it keeps, on disk or in
    memory."""

    name: str
    milliseconds: Spread
    index_bytes: int


def measure_start_up(folder: Path, num_tokens: int, sequence_length: int, repetitions: int, peers: list[str]):
    """A `StartUp` each for this project and those of `peers` (names of their files) whose order can be made alone.

    The token file is sparse: nobody reads a token here. Documents have 1,000 tokens each.
    """
    prefix = _write_sparse_shard(folder / "sparse", num_tokens)
    makers: dict[str, Callable[[], int]] = {"ours": lambda: _ours(prefix, sequence_length)}
    if "megatron_core" in peers:
        makers["megatron-core GPTDataset"] = lambda: _megatron_core(prefix, sequence_length, folder)
    if "mosaicml_streaming" in peers:
        makers["mosaicml-streaming, an epoch's order"] = lambda: _mosaicml_streaming(num_tokens, sequence_length)
    taken: dict[str, list[float]] = {name: [] for name in makers}
    kept = {name: make() for name, make in makers.items()}  # imports and first touches are not counted
    for _ in range(repetitions):
        for name, make in makers.items():
            began = time.process_time()
            make()
            taken[name].append((time.process_time() - began) * 1e3)
    return [StartUp(name, Spread.of(values), kept[name]) for name, values in taken.items()]


def _ours(prefix: Path, sequence_length: int) -> int:
    order_of([prefix], sequence_length).windows(0, 512)
    return 0


def _megatron_core(prefix: Path, sequence_length: int, folder: Path) -> int:
    peer = importlib.import_module("cpt.benchmarks.peers.megatron_core")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        peer.dataset(prefix, sequence_length, 0, Path(cache))
        return sum(path.stat().st_size for path in Path(cache).rglob("*.npy"))


def _mosaicml_streaming(num_tokens: int, sequence_length: int) -> int:
    """What its StreamingDataset makes at the start of an epoch, with its defaults, for shards of 64 MB."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    number = num_tokens // (sequence_length + 1)
    of_shard = max(1, (1 << 26) // (2 * (sequence_length + 1)))
    sizes = np.diff(np.append(np.arange(0, number, of_shard), number))
    partitions = get_partitions("relaxed", number, 1, 1, 1, 1, 1)
    shuffle = get_shuffle("py1e", sizes, 1, 1, 0)
    return partitions.nbytes + shuffle.nbytes


def _write_sparse_shard(prefix: Path, num_tokens: int) -> Path:
    number = num_tokens // _DOCUMENT_TOKENS
    dtype = np.dtype("<u2")
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(number * _DOCUMENT_TOKENS * dtype.itemsize)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(pack_header(dtype, number))
        pieces = [np.arange(i, min(number, i + _ENTRIES_AT_ONCE)) for i in range(0, number, _ENTRIES_AT_ONCE)]
        for piece in pieces:
            file.write(np.full(len(piece), _DOCUMENT_TOKENS, "<i4").tobytes())
        for piece in pieces:
            file.write((piece * (_DOCUMENT_TOKENS * dtype.itemsize)).astype("<i8").tobytes())
        for piece in pieces:
            file.write(piece.astype("<i8").tobytes())
        file.write(np.array([number], "<i8").tobytes())
    return prefix
