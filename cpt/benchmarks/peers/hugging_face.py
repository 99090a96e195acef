"""datasets: a table of samples on disk, mapped, a batch of shuffled rows at once in numpy's format.

That is what a DataLoader with a shuffling sampler asks it for; `shuffle()` and a row at a time is slower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpt.benchmarks.material import Material
from cpt.benchmarks.measure import Reader

PACKAGE = "datasets"


def readers(material: Material, folder: Path, batch: int) -> list[Reader]:
    """A batch at a time, widened to int64."""
    import datasets
    import pyarrow
    import torch

    samples = material.samples
    flat = pyarrow.array(np.ascontiguousarray(samples).reshape(-1))
    table = pyarrow.table({"tokens": pyarrow.FixedSizeListArray.from_arrays(flat, samples.shape[1])})
    datasets.disable_progress_bars()
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(folder / "datasets"))
    dataset = datasets.load_from_disk(str(folder / "datasets")).with_format("numpy")
    order, place = np.random.default_rng(1).permutation(len(samples)), 0

    def read(number: int) -> int:
        nonlocal place
        done = 0
        while done < number:
            place = 0 if place + batch > len(order) else place
            rows = dataset[order[place : place + batch].tolist()]["tokens"]
            torch.from_numpy(np.asarray(rows).astype(np.int64))
            place, done = place + batch, done + batch
        return done

    return [Reader("datasets, rows of a batch", read, batch)]
