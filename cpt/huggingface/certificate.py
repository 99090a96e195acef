"""The certificate: proof that an exported folder is the trained model, or a Fault that names what differs.

Three questions, each of which can fail alone:
    the shape      does config.json on disk say what the trained model is (rotary base and ties among it)?
    the tensors    is each one, as read back from disk, the trained weight cast to the exported type, bit for bit?
    the function   does transformers, given nothing but the folder, compute the same logits and loss on a probe?
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpt
from cpt.config.faults import Fault
from cpt.huggingface import architectures, forward, probe
from cpt.huggingface.export import Exported, told_as_fault, write_json
from cpt.huggingface.load import hashes_of_tokenizer, read_folder
from cpt.huggingface.origin import Origin
from cpt.huggingface.readers import difference_of, name_of_dtype

FILE_NAME = "certificate.json"


def certify(exported: Exported, folder: Path, probe_tokens: Tensor, origin: Origin | None = None) -> dict[str, Any]:
    """Write `certificate.json` into `folder`, and return what it says.

    exported: the trained weights, and how they were to be cast. probe_tokens [N, S + 1] int64: windows of text, of
    which a large model uses a part. Both models compute in fp32, so that a difference comes from a fault and not from
    rounding; the trained weights are first rounded to their exported type, and what that rounding alone costs in loss
    is told beside it.

    Raises Fault at the first thing that differs; there is no certificate then.
    """
    tensors = _compare_stored(exported, folder)
    dtypes = {exported.dtype(name) for name in exported.tensors}
    certificate = {
        "certificate": 2,
        "model": exported.model_name,
        "architecture": exported.config["architectures"][0],
        "dtype": name_of_dtype(exported.main_dtype) if len(dtypes) == 1 else "mixed",
        "parameters": exported.settings.num_parameters,
        "tied": exported.settings.tied,
        "rows_removed": exported.rows_removed,
        "left_out": list(origin.left_out) if origin else [],
        "rope": exported.config["rope_parameters"],
        "tensors": tensors,
        "tokenizer": hashes_of_tokenizer(folder),
        "probe": _compare_on_probe(exported, folder, probe_tokens),
        "versions": _versions(),
    }
    with told_as_fault(folder):
        write_json(folder / FILE_NAME, certificate)
    return certificate


def _compare_stored(exported: Exported, folder: Path) -> dict[str, dict[str, Any]]:
    """Their name of each tensor -> our names, shape and hash; Fault if config.json or a tensor differs."""
    stored_name, stored_settings, stored = read_folder(folder)
    stored_lines = architectures.of_model(stored_name).config_of(stored_settings)
    for line, value in exported.config.items():
        if stored_lines.get(line) != value:
            raise Fault(f"{folder}: config.json says {line} = {stored_lines.get(line)}; the trained model has {value}")
    tensors = {}
    for theirs, of_ours in exported.tensors.items():
        digest = hashlib.sha256()
        found, names = stored.files.tensors[theirs], list(of_ours.ours)
        difference = difference_of(
            exported.reader(theirs), found, lambda raw, digest=digest: digest.update(raw.numpy())
        )
        if difference:
            raise Fault(f"{folder}: tensor {theirs} is not the trained {' and '.join(names)}: {difference}")
        tensors[theirs] = {
            "from": names[0] if len(names) == 1 else names,
            "shape": list(found.shape),
            "sha256": digest.hexdigest(),
        }
    return tensors


def _compare_on_probe(exported: Exported, folder: Path, tokens: Tensor) -> dict[str, Any]:
    size = exported.settings.num_parameters
    in_layers, tokens = probe.is_in_layers(size), probe.fitted(tokens, size)
    models = [
        forward.of_ours(exported.model_name, exported.settings, exported.rounded),
        forward.of_folder(folder, in_layers),
    ]
    if exported.is_rounded:
        models.append(forward.of_ours(exported.model_name, exported.settings, exported.trained))
    found = probe.compare(models, tokens, in_layers)
    if lines := found.faults():
        raise Fault(
            f"{folder}: transformers computes something else from the same tensors than the trained model: {line}"
            for line in lines
        )
    return {
        "windows": found.num_windows,
        "tokens": found.num_tokens,
        "sha256": hashlib.sha256(tokens.contiguous().numpy()).hexdigest(),
        "in_layers": in_layers,
        "loss_trained": found.losses[-1 if exported.is_rounded else 0],
        "loss_trained_rounded": found.losses[0],
        "loss_transformers": found.losses[1],
        "loss_difference": found.loss_difference,
        "largest_logit": found.largest_logit,
        "largest_logit_difference": found.largest_logit_difference,
        "top_1_agreement": found.top_1_agreement,
    }


def _versions() -> dict[str, str]:
    import transformers

    return {"cpt": cpt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
