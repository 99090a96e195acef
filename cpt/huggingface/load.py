"""In from Hugging Face: a folder's settings and its weights under our names, each read when it is asked for.

safetensors are read in pieces, sharded or not; a legacy pytorch_model.bin only through torch's weights-only reader.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cpt.config.faults import Fault
from cpt.data.prepare.tokenizers import COMPANIONS, SENTENCEPIECE_MODEL, TOKENIZER_JSON
from cpt.huggingface import architectures
from cpt.huggingface.architectures import Stored
from cpt.huggingface.readers import InMemory, Part, Reader, difference_of, whole
from cpt.huggingface.tensor_file import StoredTensor, open_file
from cpt.tensor_writer import DTYPES, NAMES_OF_DTYPES

# In the order of preference: (the only file, the index of several).
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def read_folder(folder: Path) -> tuple[str, Any, FolderWeights]:
    """(name of our model, its settings, weights by our names) of a Hugging Face folder.

    A weight is read when it is asked for, in the type in which it is stored. Names, shapes and types are checked here.
    Raises Fault for: no config.json, an architecture or a line of it that we do not have, missing files or tensors,
    an index that names absent ones, tensors that we do not know, shapes that contradict config.json.
    """
    model_name, settings = read_config(folder)
    architecture = architectures.of_model(model_name)
    files = stored_files(folder)
    found = files.tensors
    tensors = architecture.tensors(settings)
    _check_names(folder, architecture, settings, found)
    _check_shapes(settings.shapes, tensors, found)
    return model_name, settings, FolderWeights(tensors, files)


def read_config(folder: Path) -> tuple[str, Any]:
    """(name of our model, its settings), as `read_folder` tells them, from config.json alone."""
    config_file = folder / "config.json"
    config = read_json(config_file)
    model_name, architecture = architectures.of_config(config, str(config_file))
    return model_name, architecture.settings_of(config, str(config_file))


class FolderWeights(Mapping[str, Tensor]):
    """Weights by our names; asking for one reads it. `tensors`: theirs by their names, only what the model needs."""

    def __init__(self, tensors: Mapping[str, Stored], files: StoredFiles) -> None:
        self.files = files
        self.tensors = tensors
        self._theirs = architectures.names(tensors)

    def reader(self, name: str) -> Reader:
        """Reads the weight in pieces."""
        theirs = self._theirs[name]
        stored, reader = self.tensors[theirs], self.files.tensors[theirs]
        if stored.is_only_renamed:
            return reader
        return Part(reader, len(stored.ours), stored.ours.index(name), stored.rows)

    def theirs(self, name: str) -> str:
        """Their name of the tensor that holds the weight `name`."""
        return self._theirs[name]

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.reader(name))

    def __contains__(self, name: object) -> bool:
        return name in self._theirs  # a Mapping would read the weight to see

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


class _LegacyTensor(InMemory):
    """A tensor of a file that torch.load has mapped; `stored_as` as a safetensors header would have it."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        super().__init__(tensor)
        self.path = path
        self.stored_as = NAMES_OF_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class StoredFiles:
    """What the weight files of a folder hold. `tensors`: by stored name, from whichever file.

    `headers`: file name -> its header, for safetensors. `index`: the index file as it stands, if there is one.
    """

    tensors: Mapping[str, StoredTensor | _LegacyTensor]
    headers: Mapping[str, str]
    index: str | None = None


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


def stored_files(folder: Path) -> StoredFiles:
    """Every tensor of the folder by its stored name, needed or not; Fault if a file is missing or damaged."""
    for only_file, index_file in _LAYOUTS:
        if (folder / index_file).is_file():
            return _by_index(folder, index_file)
        if (folder / only_file).is_file():
            tensors, header = _open(folder / only_file)
            return StoredFiles(tensors, {} if header is None else {only_file: header})
    raise Fault(f"{folder} holds no weights; looked for {', '.join(name for pair in _LAYOUTS for name in pair)}")


def _by_index(folder: Path, index_file: str) -> StoredFiles:
    file_of = read_json(folder / index_file).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(shard, str) for shard in file_of.values()):
        raise Fault(f"{folder / index_file} has no weight_map that gives each tensor its file; copy it again")
    shards = sorted(set(file_of.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise Fault(f"{folder / index_file} names {shard}, which is missing; copy it again" for shard in missing)
    opened = {shard: _open(folder / shard) for shard in shards}
    absent = [(name, shard) for name, shard in file_of.items() if name not in opened[shard][0]]
    if absent:
        raise Fault(f"{folder / index_file} says that {shard} holds {name}; it does not" for name, shard in absent)
    return StoredFiles(
        {name: opened[shard][0][name] for name, shard in file_of.items()},
        {shard: header for shard, (_, header) in opened.items() if header is not None},
        (folder / index_file).read_text(encoding="utf-8"),
    )


def _open(path: Path) -> tuple[Mapping[str, StoredTensor | _LegacyTensor], str | None]:
    """(tensors by name, the header if it has one)."""
    if path.suffix == ".safetensors":
        return open_file(path)
    try:
        tensors = _load_legacy(path)
    except Exception as error:  # the reader's refusals have many classes
        reason = str(error).splitlines()[0]
        raise Fault(f"{path} is damaged, or holds more than weights, which is not read: {reason}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise Fault(f"{path} holds something other than tensors by name")
    return {name: _LegacyTensor(tensor, path) for name, tensor in tensors.items()}, None


def _load_legacy(path: Path) -> Any:
    # Files of before torch 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _check_names(folder: Path, architecture: ModuleType, settings: Any, stored: Mapping[str, Any]) -> None:
    names = set(architecture.tensors(settings))
    (asked,) = architecture.config_of(settings)["architectures"]
    faults = [f"{folder}: tensor {name} is missing" for name in sorted(names - set(stored))]
    for name in stored:
        if name in names or architecture.is_no_weight(name):
            continue
        copied = architecture.tied_names(settings).get(name)
        if copied is None:
            faults.append(f"{folder}: tensor {name} is no part of {asked} as config.json describes it")
        elif copied in stored and difference_of(stored[copied], stored[name]):
            faults.append(f"{folder}: config.json ties {name} to {copied}, but the two differ")
    if faults:
        raise Fault(_first(faults))


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored], found: Mapping[str, Any]
) -> None:
    faults = []
    for theirs, stored in tensors.items():
        tensor, shape = found[theirs], stored.shape(shapes)
        if tensor.shape != shape:
            faults.append(f"{tensor.path}: {theirs} has shape {tensor.shape}; config.json says {shape}")
        elif tensor.stored_as not in DTYPES:
            faults.append(f"{tensor.path}: {theirs} is {tensor.stored_as}; we read {', '.join(DTYPES)}")
    if faults:
        raise Fault(_first(faults))


def _first(faults: list[str], num_shown: int = 8) -> list[str]:
    rest = len(faults) - num_shown
    return faults if rest <= 0 else [*faults[:num_shown], f"... and {rest} more of this kind"]
