"""What a Hugging Face folder is like before a run begins from it: its loss on a text, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface import forward, probe
from cpt.huggingface.load import FolderWeights
from cpt.huggingface.readers import Reader

# A row this much smaller than the middle one of its table was never trained; as a rule it is padding.
_NEAR_ZERO = 1e-3
_ROWS_AT_ONCE = 4096


def loss_of_folder(folder: Path, num_parameters: int, tokens: Tensor) -> float:
    """Mean loss in nats a token of the folder's model under transformers, fp32 on the CPU, on `tokens` [N, S + 1].

    A large model is computed layer by layer and is never in memory as a whole. So is one in a legacy file, whose
    weights transformers would not read with the weights-only reader alone.
    """
    in_layers = probe.is_in_layers(num_parameters) or not any(folder.glob("*.safetensors"))
    return probe.loss_of(forward.of_folder(folder, in_layers), tokens, in_layers)


def oddities(folder: Path, settings: Any, weights: FolderWeights) -> list[str]:
    """Lines about what a run from this folder should know: rows that were never trained, rows without a token."""
    told = []
    entries = _entries(folder)
    if entries is not None and entries != settings.vocabulary:
        what = "padding" if entries < settings.vocabulary else "tokens without a row"
        told.append(f"the tokenizer has {entries:,} entries, the embedding {settings.vocabulary:,} rows: {what}")
    for name in ("embedding.weight", "head.weight"):
        if name in weights:
            told.extend(_small_rows(name, weights.reader(name), entries))
    return told


def _entries(folder: Path) -> int | None:
    try:
        return Tokenizer.open(folder).vocabulary_size
    except ValueError:
        return None  # a folder without a tokenizer: the corpora say which one they were built with


def _small_rows(name: str, reader: Reader, entries: int | None) -> Iterator[str]:
    norms = torch.cat(list(_norms(reader)))
    small = torch.nonzero(norms <= _NEAR_ZERO * norms.median()).flatten().tolist()
    of_tokens = [row for row in small if entries is None or row < entries]
    if small:
        shown = ", ".join(map(str, small[:5])) + (", ..." if len(small) > 5 else "")
        yield (
            f"{name}: {len(small):,} of {len(norms):,} rows are zero or nearly so ({shown}), {len(of_tokens):,} of "
            "them of tokens that the tokenizer has: text with these begins at a high loss"
        )


def _norms(reader: Reader) -> Iterator[Tensor]:
    """Length of each row, [rows], some at a time."""
    num_rows, width = reader.shape
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, num_rows)
        yield reader.read(first * width, last * width).float().view(-1, width).norm(dim=1)
