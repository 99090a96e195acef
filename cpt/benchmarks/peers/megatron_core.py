"""megatron-core: GPTDataset over the same `.bin` and `.idx`, one sample after the other in its shuffled order.

As its data loading guide has it: the index is built beforehand, files are mapped. A sample is a dictionary of int64
tensors, not yet put into a batch; that we do not ask for it is in its favour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpt.benchmarks.material import Material
from cpt.benchmarks.measure import Reader

PACKAGE = "megatron-core"

# What is switched on besides the tokens.
_MODES: dict[str, dict[str, bool]] = {
    "": {},
    ", positions and loss by document": {"reset_position_ids": True, "eod_mask_loss": True},
    ", attention mask (its default)": {"create_attention_mask": True},
    ", attention mask by document": {
        "create_attention_mask": True,
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "eod_mask_loss": True,
    },
}
_OFF = {"create_attention_mask": False, "reset_attention_mask": False, "reset_position_ids": False}


def readers(material: Material, folder: Path, batch: int) -> list[Reader]:
    """Without a mask, with what its options add for documents, and with masks of S x S."""
    return [_reader(f"megatron-core GPTDataset{name}", material, folder, mode) for name, mode in _MODES.items()]


def dataset(prefix: Path, sequence_length: int, end_of_document: int, cache: Path, **options: bool) -> Any:
    """A GPTDataset of one epoch, its index built in `cache`."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad = None, end_of_document, -1
        unique_identifiers = {"class": "none"}

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=Tokenizer(),
        path_to_cache=str(cache),
        **{**_OFF, "eod_mask_loss": False, **options},
    )
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def _reader(name: str, material: Material, folder: Path, options: dict[str, bool]) -> Reader:
    samples = dataset(material.whole, material.sequence_length, material.end_of_document, folder / "cache", **options)
    index = 0

    def read(number: int) -> int:
        nonlocal index
        for _ in range(number):
            samples[index]
            index = (index + 1) % len(samples)
        return number

    return Reader(name, read)
