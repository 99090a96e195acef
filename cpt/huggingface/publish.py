"""The one way out: written aside, certified aside, and only then renamed. A folder with its name is a certified one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.config.faults import Fault
from cpt.huggingface.certificate import certify
from cpt.huggingface.export import aside, stored_dtypes, write_folder
from cpt.huggingface.exported import Exported
from cpt.huggingface.origin import Origin
from cpt.huggingface.probe import random_probe
from cpt.huggingface.readers import Weight


def publish(
    model_name: str,
    settings: Any,
    weights: Mapping[str, Weight],
    output: Path,
    *,
    dtype: torch.dtype | None,
    tokenizer_folder: Path | None = None,
    probe_tokens: Tensor | None = None,
    max_shard_bytes: int | None = None,
    vocabulary: int | None = None,
    lineage: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Export the trained weights as a Hugging Face folder `output`; returns its certificate.

    `weights` has a tensor for each of our names, or a function that fetches it; fp32 masters where there are some.
    `dtype`: None for the types of `origin`, the folder that the weights were imported from, whose layout is kept unless
    `max_shard_bytes` is given; else files of 5 GB. `vocabulary`: rows to keep, if not all.
    `probe_tokens` [N, S + 1] int64 are windows of text for the certificate; random ones if there is none at hand.
    Raises Fault if `output` is in use, if weights or tokenizer do not fit the settings, if the disk is full, or if the
    written folder is not the trained model; nothing is left behind then.
    """
    if vocabulary is not None and not 1 <= vocabulary <= settings.vocabulary:
        raise Fault(f"vocabulary = {vocabulary}: the model has {settings.vocabulary} rows, of which at least 1 is kept")
    assert dtype is not None or origin is not None
    exported = Exported(model_name, settings, weights, dtype or stored_dtypes(origin), vocabulary)
    if probe_tokens is None:
        probe_tokens = random_probe(exported.settings.vocabulary, settings.longest_sequence)
    with aside(output) as folder:
        write_folder(folder, exported, tokenizer_folder, max_shard_bytes, lineage, origin)
        return certify(exported, folder, probe_tokens, origin)
