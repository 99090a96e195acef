"""Are two Hugging Face folders the same model? Shape, tensors and tokenizer compared, nothing computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cpt.huggingface import architectures
from cpt.huggingface.certificate import describe_difference
from cpt.huggingface.load import hashes_of_tokenizer, read_folder


def verify(folder_a: Path, folder_b: Path) -> list[str]:
    """One line for each difference, `folder_a` taken as right; none if both are the same model to the bit.

    How tensors are spread over files does not matter. Raises Fault for a folder that cannot be read at all.
    """
    name_a, settings_a, weights_a = read_folder(folder_a)
    name_b, settings_b, weights_b = read_folder(folder_b)
    config_a = architectures.of_model(name_a).config_of(settings_a)
    config_b = architectures.of_model(name_b).config_of(settings_b)
    lines = _differences(config_a, config_b, "config.json: {}")
    names = {**architectures.of_model(name_b).names(settings_b), **architectures.of_model(name_a).names(settings_a)}
    lines += _different_tensors(weights_a, weights_b, names)
    return lines + _differences(hashes_of_tokenizer(folder_a), hashes_of_tokenizer(folder_b), "tokenizer file {}")


def _differences(a: Mapping[str, object], b: Mapping[str, object], where: str) -> list[str]:
    return [
        f"{where.format(name)}: {b.get(name)} in place of {a.get(name)}"
        for name in [*a, *(name for name in b if name not in a)]
        if a.get(name) != b.get(name)
    ]


def _different_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    lines = []
    for ours, theirs in names.items():
        if ours not in a or ours not in b:
            lines.append(f"tensor {theirs}: only in the {'first' if ours in a else 'second'} folder")
        elif difference := describe_difference(a[ours], b[ours]):
            lines.append(f"tensor {theirs}: {difference}")
    return lines
