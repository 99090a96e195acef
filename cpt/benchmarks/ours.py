"""This project's own readers, and the loop over a memory map that simple trainers have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cpt.benchmarks.material import Material
from cpt.benchmarks.measure import Reader
from cpt.data.loader import Loader, Settings
from cpt.data.order import Source, StageOrder
from cpt.lineage.ledger import Ledger

_SLOTS = 1 << 40  # a stage that does not end


def readers(material: Material, batch: int) -> list[Reader]:
    """Order and reading together: one source and two, with and without document starts, and reading ahead."""
    length = material.sequence_length
    one, two = order_of([material.whole], length), order_of(list(material.halves), length)
    return [
        _reader("ours, 1 source", one, batch, 0, False),
        _reader("ours, 1 source, read ahead in a thread", one, batch, 2, False),
        _reader("ours, 2 sources", two, batch, 0, False),
        _reader("ours, 1 source, document starts", one, batch, 0, True),
        _reader("ours, 2 sources, document starts", two, batch, 0, True),
    ]


def order_of(prefixes: list[Path], sequence_length: int) -> StageOrder:
    """The order of a stage over these shards, in equal shares."""
    sources = {prefix.name: Source(prefix) for prefix in prefixes}
    return StageOrder(sources, None, Ledger(), sequence_length, 1)


def _reader(name: str, order: StageOrder, batch: int, prefetch: int, within_documents: bool) -> Reader:
    loader = Loader(order, 0, 1, Settings(prefetch), within_documents, num_slots_in_stage=_SLOTS)
    slot = 0

    def read(number: int) -> int:
        nonlocal slot
        begin = slot
        while slot < begin + number:
            loader.batch(slot, batch)
            slot += batch
        return slot - begin

    return Reader(name, read, batch)


def slice_loop(material: Material, batch: int) -> Reader:
    """A batch as simple trainers make it: random places in a memory map, a slice and a widening copy each, a stack."""
    tokens, length = material.tokens, material.sequence_length + 1
    places = torch.Generator().manual_seed(1)

    def read(number: int) -> int:
        done = 0
        while done < number:
            begins = torch.randint(len(tokens) - length, (batch,), generator=places)
            torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in begins.tolist()])
            done += batch
        return done

    return Reader("loop of slices of a memory map", read, batch)
