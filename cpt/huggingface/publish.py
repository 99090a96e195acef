"""The one way out: written aside, certified aside, and only then renamed. A folder with its name is a certified one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.huggingface.certificate import certify
from cpt.huggingface.export import Weight, aside, write_folder

logger = logging.getLogger(__name__)


def publish(
    model_name: str,
    settings: Any,
    weights: Mapping[str, Weight],
    output: Path,
    *,
    dtype: torch.dtype,
    tokenizer_folder: Path | None = None,
    probe_tokens: Tensor | None = None,
    max_shard_bytes: int = 5 * 10**9,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export the trained weights as a Hugging Face folder `output`; returns its certificate.

    `weights` has a tensor for each of our names, or a function that fetches it; fp32 masters where there are some.
    `probe_tokens` [N, S + 1] int64 are windows of text for the certificate; random ones if there is none at hand.
    Raises Fault if `output` is in use, if weights or tokenizer do not fit the settings, if the disk is full, or if the
    written folder is not the trained model; nothing is left behind then.
    """
    if probe_tokens is None:
        probe_tokens = random_probe(settings.vocabulary, settings.longest_sequence)
    with aside(output) as folder:
        write_folder(folder, model_name, settings, weights, tokenizer_folder, dtype, max_shard_bytes, lineage)
        certificate = certify(weights, model_name, settings, folder, probe_tokens, dtype)
    probe = certificate["probe"]
    logger.info(
        "exported %s: loss %.6f, under transformers %.6f, top-1 agreement %.4f",
        output, probe["loss_trained"], probe["loss_transformers"], probe["top_1_agreement"],
    )  # fmt: skip
    return certificate


def random_probe(vocabulary: int, longest_sequence: int, num_windows: int = 4) -> Tensor:
    """Windows of random tokens, always the same ones: [num_windows, up to 129]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (num_windows, min(128, longest_sequence) + 1), generator=generator)
