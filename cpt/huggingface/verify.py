"""Are two places the same model? Each a Hugging Face folder, or weights of ours: shape, tensors, tokenizer, logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.config.faults import Fault
from cpt.huggingface import architectures, certificate, forward, probe
from cpt.huggingface.exported import Exported
from cpt.huggingface.load import FolderWeights, hashes_of_tokenizer, read_folder, read_json
from cpt.huggingface.readers import Reader, Weight, count_not_finite, difference_of


@dataclass(frozen=True)
class Subject:
    """One of the two models. `folder`: where it lies, if that is a Hugging Face folder; its weights are read there.

    tokenizer: the folder of its tokenizer's files; None if it has none.
    """

    model_name: str
    settings: Any
    weights: Mapping[str, Weight]
    tokenizer: Path | None
    folder: Path | None = None

    @staticmethod
    def of_folder(folder: Path) -> Subject:
        """The model of a Hugging Face folder. Raises Fault if it cannot be read."""
        name, settings, weights = read_folder(folder)
        return Subject(name, settings, weights, folder, folder)

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says, or would say."""
        return architectures.of_model(self.model_name).config_of(self.settings)


@dataclass(frozen=True)
class Verdict:
    """What was found. `differences`: one line for each, none if both are the same model.

    rows_removed: by which the second is shorter. num_tensors: how many were compared. probe: what both computed; None
    if they are not of one shape.
    """

    differences: list[str]
    rows_removed: int
    num_tensors: int
    tokenizer: Mapping[str, str]
    probe: probe.Probe | None


def verify(folder_a: Path, folder_b: Path) -> list[str]:
    """One line for each difference, `folder_a` taken as right; none if both are the same model to the bit.

    How tensors are spread over files does not matter. Nothing is computed. Raises Fault for a folder that cannot be
    read at all.
    """
    return examine(Subject.of_folder(folder_a), Subject.of_folder(folder_b), computes=False).differences


def examine(a: Subject, b: Subject, probe_tokens: Tensor | None = None, computes: bool = True) -> Verdict:
    """How `b` differs from `a`, which is taken as right.

    Two folders must hold the same types. Weights of ours against a folder are rounded as the folder's are; a folder
    against weights of ours, and ours against ours, are compared in fp32. A folder may have fewer rows of tokens than
    weights of ours if its certificate says so. With `computes`, both then compute the logits of `probe_tokens`
    [N, S + 1], or of random ones: a folder's under transformers.
    """
    rows_removed = _rows_removed(a, b)
    vocabulary = b.settings.vocabulary if rows_removed else None
    types = _types_of_comparison(a, b)
    first, second = (
        Exported(one.model_name, one.settings, one.weights, dtypes, rows)
        for one, dtypes, rows in ((a, types[0], vocabulary), (b, types[1], None))
    )
    lines = _differences(first.config, second.config, "config.json: {}")
    names = {**second.tensors, **first.tensors}
    for name in names:
        if name not in first.tensors or name not in second.tensors:
            lines.append(f"tensor {name}: only in the {'first' if name in first.tensors else 'second'} model")
        elif difference := _difference(first.reader(name), second.reader(name)):
            lines.append(f"tensor {name}: {difference}")
    tokenizers = [hashes_of_tokenizer(one.tokenizer) if one.tokenizer else {} for one in (a, b)]
    lines += _differences(*tokenizers, "tokenizer file {}")
    found = None
    if computes and first.settings.shapes == second.settings.shapes:
        found = _compute(a, first, b, second, probe_tokens)
        lines += [] if lines else [f"the same tensors, but {line}" for line in found.faults()]
    return Verdict(lines, rows_removed, len(names), tokenizers[1], found)


def _rows_removed(a: Subject, b: Subject) -> int:
    """How many rows the certificate of `b` says were removed, if it is a folder, `a` is none, and it has fewer."""
    if a.folder or not b.folder or a.settings.vocabulary <= b.settings.vocabulary:
        return 0
    told = b.folder / certificate.FILE_NAME
    removed = read_json(told).get("rows_removed") if told.is_file() else 0
    return removed if removed == a.settings.vocabulary - b.settings.vocabulary else 0


def _types_of_comparison(a: Subject, b: Subject) -> tuple[Any, Any]:
    """The types in which the tensors of each are compared."""
    if a.folder and b.folder:
        return _Types(a.weights), _Types(b.weights)
    common = _Types(b.weights) if b.folder else torch.float32
    return common, common


class _Types(dict):
    """The type of each tensor of a folder by its name; fp32 for one that it does not have."""

    def __init__(self, weights: FolderWeights) -> None:
        super().__init__({name: weights.files.tensors[name].dtype for name in weights.tensors})

    def __missing__(self, name: str) -> torch.dtype:
        return torch.float32


def _difference(expected: Reader, found: Reader) -> str:
    num_bad = 0

    def count(raw: Tensor) -> None:
        nonlocal num_bad
        num_bad += count_not_finite(raw.view(found.dtype))

    return difference_of(expected, found, count) or (f"{num_bad} values are NaN or infinite" if num_bad else "")


def _compute(a: Subject, first: Exported, b: Subject, second: Exported, tokens: Tensor | None) -> probe.Probe:
    settings = second.settings
    if tokens is None:
        tokens = probe.random_probe(settings.vocabulary, settings.longest_sequence)
    if int(tokens.max()) >= settings.vocabulary:
        raise Fault(f"the probe text has token {int(tokens.max())}, the models have {settings.vocabulary} rows")
    in_layers = probe.is_in_layers(settings.num_parameters)
    models = [
        forward.of_folder(one.folder, in_layers)
        if one.folder
        else forward.of_ours(one.model_name, tensors.settings, tensors.rounded)
        for one, tensors in ((a, first), (b, second))
    ]
    return probe.compare(models, probe.fitted(tokens, settings.num_parameters), in_layers)


def _differences(a: Mapping[str, object], b: Mapping[str, object], where: str) -> list[str]:
    return [
        f"{where.format(name)}: {b.get(name)} in place of {a.get(name)}"
        for name in [*a, *(name for name in b if name not in a)]
        if a.get(name) != b.get(name)
    ]
