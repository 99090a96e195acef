"""What a folder is to hold: each of its tensors from our weights, cast, joined and without the rows that go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from cpt.config.faults import Fault
from cpt.huggingface import architectures
from cpt.huggingface.readers import (
    Cast,
    FirstRows,
    Joined,
    Reader,
    Weight,
    count_not_finite,
    name_of_dtype,
    pieces,
    reader_of,
)


class Exported:
    """The tensors that a folder is to have, by their names: each reads its weights and casts them, piece by piece.

    settings: the exported model's, with a vocabulary of `vocabulary` rows, if that is not None. dtypes: one type for
    all, or that of each tensor by its name there.
    """

    def __init__(
        self,
        model_name: str,
        settings: Any,
        weights: Mapping[str, Weight],
        dtypes: torch.dtype | Mapping[str, torch.dtype],
        vocabulary: int | None = None,
    ) -> None:
        self.model_name, self.weights = model_name, weights
        self.settings = settings if vocabulary is None else dataclasses.replace(settings, vocabulary=vocabulary)
        self.architecture = architectures.of_model(model_name)
        self.tensors = self.architecture.tensors(self.settings)
        self.config = self.architecture.config_of(self.settings)
        self.shapes = self.settings.shapes  # once: it makes them anew each time it is asked
        self._dtypes = dtypes
        names = [name for stored in self.tensors.values() for name in stored.ours]
        assert sorted(names) == sorted(self.shapes), "every parameter goes into exactly one tensor"
        _check_names(weights, names)
        self._theirs = architectures.names(self.tensors)
        self._in_rows_of_tokens = _shapes_of_tokens(self.settings)
        self.rows_removed = 0

    def dtype(self, theirs: str) -> torch.dtype:
        """Type of a tensor."""
        return self._dtypes if isinstance(self._dtypes, torch.dtype) else self._dtypes[theirs]

    @property
    def main_dtype(self) -> torch.dtype:
        """The type of most tensors, which config.json tells."""
        dtypes = [self.dtype(name) for name in self.tensors]
        return max(dtypes, key=dtypes.count)

    def shape(self, theirs: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors[theirs].shape(self.shapes)

    def reader(self, theirs: str) -> Reader:
        """Reads a tensor as it is to lie in the file."""
        stored = self.tensors[theirs]
        parts = [Cast(self.trained(name), self.dtype(theirs)) for name in stored.ours]
        return parts[0] if stored.is_only_renamed else Joined(parts, stored.rows)

    def trained(self, name: str) -> Reader:
        """Reads a weight of ours as it was trained, without the rows that go; Fault if its shape is another."""
        reader, shape = reader_of(self.weights, name), self.shapes[name]
        if name in self._in_rows_of_tokens and reader.shape[1:] == shape[1:] and reader.shape[0] > shape[0]:
            self.rows_removed = reader.shape[0] - shape[0]
            reader = FirstRows(reader, shape[0])
        if tuple(reader.shape) != tuple(shape):
            raise Fault(f"weight {name} has shape {tuple(reader.shape)}; the settings of the model say {tuple(shape)}")
        return reader

    def rounded(self, name: str) -> Reader:
        """Reads a weight of ours as it was trained, rounded to the type that it has in the file."""
        return Cast(self.trained(name), self.dtype(self._theirs[name]))

    @property
    def is_rounded(self) -> bool:
        """Whether any weight has another type in the file than it was trained in."""
        return any(self.trained(name).dtype is not self.dtype(theirs) for name, theirs in self._theirs.items())

    def fault_of(self, theirs: str) -> Fault:
        """Why a tensor is not finite: in which weight, how often, and whether it was before the cast."""
        for name in self.tensors[theirs].ours:
            trained, dtype = self.trained(name), self.dtype(theirs)
            num_bad = sum(count_not_finite(piece.to(dtype)) for _, piece in pieces(trained))
            if num_bad:
                were_bad = any(count_not_finite(piece) for _, piece in pieces(trained))
                too_large = f"too large for {name_of_dtype(dtype)}; export as bfloat16 or float32"
                num_values = sum(len(piece) for _, piece in pieces(trained))
                return Fault(
                    f"weight {name}: {num_bad} of {num_values} values are "
                    f"{'NaN or infinite' if were_bad else too_large}"
                )
        return Fault(f"tensor {theirs} is not finite, but was when it was read again: is the memory sound?")


def _check_names(weights: Mapping[str, Weight], names: list[str]) -> None:
    faults = [
        f"weight {name} is missing; the settings of the model ask for it" for name in names if name not in weights
    ]
    asked = set(names)
    faults += [
        f"weight {name} is not part of the model that the settings describe" for name in weights if name not in asked
    ]
    if faults:
        raise Fault(faults)


def _shapes_of_tokens(settings: Any) -> set[str]:
    """Names of the weights that have a row for each token of the vocabulary."""
    larger = dataclasses.replace(settings, vocabulary=settings.vocabulary + 1).shapes
    return {name for name, shape in settings.shapes.items() if larger[name] != shape}
