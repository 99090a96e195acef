"""Which weight files an exported folder has and what lies where in them, before a byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cpt.huggingface.origin import Origin
from cpt.tensor_writer import DTYPES, Layout, in_order

INDEX = "model.safetensors.index.json"
Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Shards:
    """Layouts by file name, and the text of the index; None where one file needs none."""

    layouts: Mapping[str, Layout]
    index: str | None

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(layout.num_bytes for layout in self.layouts.values())


def new_shards(tensors: Tensors, max_shard_bytes: int) -> Shards:
    """Files in the order of the tensors, each of at most `max_shard_bytes` of them; a larger tensor is alone."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = []
    filled = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if not shards or filled + num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += num_bytes
    if len(shards) == 1:
        return Shards({"model.safetensors": Layout.of_tensors(shards[0])}, None)
    layouts = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": Layout.of_tensors(shard)
        for number, shard in enumerate(shards, start=1)
    }
    return Shards(layouts, _index_of(layouts, tensors))


def shards_as_they_lay(origin: Origin, tensors: Tensors) -> Shards | None:
    """The files of the folder that was imported, byte for byte if types and shapes are the same; None if it had other
    tensors, or none whose layout is known."""
    layouts, lay = {}, origin.files()
    for file, layout in lay.items():
        here = {name: tensors[name] for name in in_order(layout) if name in tensors}
        if here:
            is_same = {name: (DTYPES.get(place[0]), place[1]) for name, place in layout.places.items()} == here
            layouts[file] = layout if is_same else Layout.of_tensors(here)
    if sorted(name for layout in layouts.values() for name in layout.places) != sorted(tensors):
        return None
    index = origin.index if origin.index is None or layouts == lay else _index_of(layouts, tensors)
    return Shards(layouts, index)


def _index_of(layouts: Mapping[str, Layout], tensors: Tensors) -> str:
    file_of = {name: file for file, layout in layouts.items() for name in layout.places}
    metadata = {
        "total_parameters": sum(math.prod(shape) for _, shape in tensors.values()),
        "total_size": sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()),
    }
    return json.dumps({"metadata": metadata, "weight_map": {name: file_of[name] for name in tensors}}, indent=2) + "\n"
