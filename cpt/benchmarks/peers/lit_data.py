"""litdata: a StreamingDataset of a TokensLoader, shuffled, iterated over, as its guide to language models does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from cpt.benchmarks.material import Material
from cpt.benchmarks.measure import Reader

PACKAGE = "litdata"


def readers(material: Material, folder: Path, batch: int) -> list[Reader]:
    """A sample at a time, widened to int64."""
    import torch
    from litdata import StreamingDataset, TokensLoader, optimize

    length = material.sequence_length + 1
    written = folder / "litdata"
    optimize(
        fn=partial(_stretches, material),
        inputs=[0],
        output_dir=str(written),
        chunk_size=length * 16_384,
        item_loader=TokensLoader(),
        num_workers=1,
        start_method="fork",
        verbose=False,
    )
    samples = StreamingDataset(str(written), item_loader=TokensLoader(block_size=length), shuffle=True, seed=1)
    ahead = iter(samples)

    def read(number: int) -> int:
        nonlocal ahead
        for _ in range(number):
            sample = next(ahead, None)
            if sample is None:
                ahead = iter(samples)
                sample = next(ahead)
            sample.to(torch.int64)
        return number

    return [Reader("litdata StreamingDataset, iterated", read)]


def _stretches(material: Material, _: int):
    import torch

    for stretch in np.array_split(material.samples, max(1, len(material.samples) // 1024)):
        yield torch.from_numpy(stretch.reshape(-1).copy())
