"""In from Hugging Face: a folder's settings and its weights under our names, each read when it is asked for.

safetensors are memory-mapped, sharded or not. A legacy pytorch_model.bin goes only through torch's weights-only reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpt.config.faults import Fault
from cpt.data.prepare.tokenizers import COMPANIONS, SENTENCEPIECE_MODEL, TOKENIZER_JSON
from cpt.huggingface import architectures

_NAMES_OF_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# In the order of preference: (the only file, the index of several).
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_folder(folder: Path) -> tuple[str, Any, Mapping[str, Tensor]]:
    """(name of our model, its settings, weights by our names) of a Hugging Face folder.

    A weight is read when it is asked for, in the type in which it is stored. Names, shapes and types are checked here.
    Raises Fault for: no config.json, an architecture or a line of it that we do not have, missing files or tensors,
    an index that names absent ones, tensors that we do not know, shapes that contradict config.json.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    model_name, architecture = architectures.of_config(config, str(config_file))
    settings = architecture.settings_of(config, str(config_file))
    stored = _stored_tensors(folder)
    names = architecture.names(settings)
    _check_names(folder, architecture, settings, stored)
    _check_shapes(folder, settings.shapes, names, stored)
    return model_name, settings, FolderWeights({ours: stored[theirs] for ours, theirs in names.items()})


class FolderWeights(Mapping[str, Tensor]):
    """Weights by our names; asking for one reads it."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class StoredTensor:
    """One tensor of an open safetensors file."""

    def __init__(self, file: Any, path: Path, name: str) -> None:
        self._file, self._name, self.path = file, name, path
        head = file.get_slice(name)
        self.shape, self.dtype = tuple(head.get_shape()), head.get_dtype()

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        return self._file.get_tensor(self._name)


class _LegacyTensor:
    """The same of a file that torch.load has read."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        self._tensor, self.path = tensor, path
        self.shape, self.dtype = tuple(tensor.shape), _NAMES_OF_DTYPES.get(tensor.dtype, str(tensor.dtype))

    def read(self) -> Tensor:
        return self._tensor


def hashes_of_tokenizer(folder: Path) -> dict[str, str]:
    """File name -> sha256 of each of the tokenizer's files in the folder; there may be none."""
    files = (folder / name for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL, *COMPANIONS))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a Hugging Face folder; Fault if it is missing or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(f"{file} is missing; name a Hugging Face folder with config.json and weights") from None
    except OSError as error:
        raise Fault(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Fault(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Fault(f"{file} holds a {type(content).__name__}, expected names and values")
    return content


def _stored_tensors(folder: Path) -> dict[str, StoredTensor | _LegacyTensor]:
    """Every tensor of the folder by its stored name."""
    for only_file, index_file in _LAYOUTS:
        if (folder / index_file).is_file():
            return _by_index(folder, index_file)
        if (folder / only_file).is_file():
            return _open_file(folder / only_file)
    raise Fault(f"{folder} holds no weights; looked for {', '.join(name for pair in _LAYOUTS for name in pair)}")


def _by_index(folder: Path, index_file: str) -> dict[str, StoredTensor | _LegacyTensor]:
    file_of = read_json(folder / index_file).get("weight_map", {})
    shards = sorted(set(file_of.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise Fault(f"{folder / index_file} names {shard}, which is missing; copy it again" for shard in missing)
    opened = {shard: _open_file(folder / shard) for shard in shards}
    absent = [(name, shard) for name, shard in file_of.items() if name not in opened[shard]]
    if absent:
        raise Fault(f"{folder / index_file} says that {shard} holds {name}; it does not" for name, shard in absent)
    return {name: opened[shard][name] for name, shard in file_of.items()}


def _open_file(path: Path) -> dict[str, StoredTensor | _LegacyTensor]:
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise Fault(f"{path} is damaged: {error}") from None
        return {name: StoredTensor(file, path, name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader's refusals have many classes
        reason = str(error).splitlines()[0]
        raise Fault(f"{path} is damaged, or holds more than weights, which is not read: {reason}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise Fault(f"{path} holds something other than tensors by name")
    return {name: _LegacyTensor(tensor, path) for name, tensor in tensors.items()}


def _check_names(folder: Path, architecture: ModuleType, settings: Any, stored: Mapping[str, Any]) -> None:
    names = set(architecture.names(settings).values())
    faults = [f"{folder}: tensor {name} is missing" for name in sorted(names - set(stored))]
    for name in stored:
        if name in names or architecture.is_no_weight(name):
            continue
        copied = architecture.tied_names(settings).get(name)
        if copied is None:
            faults.append(
                f"{folder}: tensor {name} is no part of {architecture.ARCHITECTURE} as config.json describes it"
            )
        elif copied in stored and not torch.equal(stored[name].read(), stored[copied].read()):
            faults.append(f"{folder}: config.json ties {name} to {copied}, but the two differ")
    if faults:
        raise Fault(_first(faults))


def _check_shapes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], stored: Mapping[str, Any]
) -> None:
    faults = []
    for ours, theirs in names.items():
        tensor = stored[theirs]
        if tensor.shape != shapes[ours]:
            faults.append(f"{tensor.path}: {theirs} has shape {tensor.shape}; config.json says {shapes[ours]}")
        elif tensor.dtype not in _NAMES_OF_DTYPES.values():
            faults.append(f"{tensor.path}: {theirs} is {tensor.dtype}; we read {', '.join(_NAMES_OF_DTYPES.values())}")
    if faults:
        raise Fault(_first(faults))


def _first(faults: list[str], num_shown: int = 8) -> list[str]:
    rest = len(faults) - num_shown
    return faults if rest <= 0 else [*faults[:num_shown], f"... and {rest} more of this kind"]
