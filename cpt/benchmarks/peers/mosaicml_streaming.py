"""mosaicml-streaming: a local StreamingDataset of MDS shards that hold a sample a row, iterated over and by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpt.benchmarks.material import Material
from cpt.benchmarks.measure import Reader

PACKAGE = "mosaicml-streaming"


def readers(material: Material, folder: Path, batch: int) -> list[Reader]:
    """A sample at a time, widened to int64: in the order that it shuffles, and at places drawn at random."""
    import torch
    from streaming import MDSWriter, StreamingDataset

    written = folder / "mds"
    samples = material.samples
    row = f"ndarray:{samples.dtype.name}:{samples.shape[1]}"
    with MDSWriter(out=str(written), columns={"tokens": row}) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
    dataset = StreamingDataset(local=str(written), shuffle=True, shuffle_seed=1, batch_size=batch)
    ahead = iter(dataset)
    places = np.random.default_rng(1)

    def iterate(number: int) -> int:
        nonlocal ahead
        for _ in range(number):
            sample = next(ahead, None)
            if sample is None:
                ahead = iter(dataset)
                sample = next(ahead)
            torch.from_numpy(sample["tokens"].astype(np.int64))
        return number

    def look_up(number: int) -> int:
        for index in places.integers(len(samples), size=number).tolist():
            torch.from_numpy(dataset[index]["tokens"].astype(np.int64))
        return number

    return [
        Reader("mosaicml-streaming StreamingDataset, iterated", iterate),
        Reader("mosaicml-streaming StreamingDataset[i]", look_up),
    ]
