"""Out to Hugging Face: a folder that transformers reads, written aside and renamed when it is whole.

weights --name by name, cast--> model*.safetensors + index      settings --> config.json, generation_config.json
tokenizer's files, byte for byte                                lineage  --> README.md
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cpt.config.faults import Fault
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface import architectures
from cpt.huggingface.card import model_card

Weight = Tensor | Callable[[], Tensor]
# What a request may call the type of the exported weights.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name at the end of the block, and vanishes if the block fails.

    Raises Fault if `output` is in use: anything but an empty folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise Fault(f"{output} is in use; name a folder that is not there yet, or remove it")
    folder = output.parent / f".{output.name}.aside-{os.getpid()}"
    with told_as_fault(output):
        folder.mkdir(parents=True)
    try:
        yield folder
        with told_as_fault(output):
            folder.rename(output)
    except Fault as fault:
        # The reader knows the folder by the name that it was to have.
        raise Fault(line.replace(str(folder), str(output)) for line in fault.lines) from fault
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def told_as_fault(output: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written becomes one line."""
    try:
        yield
    except OSError as error:
        raise Fault(f"{output} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise Fault(f"{output} cannot be written: {error}") from error


def write_folder(
    folder: Path,
    model_name: str,
    settings: Any,
    weights: Mapping[str, Weight],
    tokenizer_folder: Path | None,
    dtype: torch.dtype,
    max_shard_bytes: int,
    lineage: Mapping[str, Any] | None,
) -> None:
    """Fill an existing folder. `weights` has a tensor for each of our names, or a function that fetches it.

    One shard at a time is in memory. Raises Fault for weights that do not fit the settings or are not finite, for a
    tokenizer that does not fit the model, and for what a disk may answer.
    """
    architecture = architectures.of_model(model_name)
    names = architecture.names(settings)
    _check_names(weights, names)
    tokenizer = None if tokenizer_folder is None else _open_tokenizer(tokenizer_folder, settings.vocabulary)
    # null, where there is none: for a line that is missing transformers takes 1 and 2.
    special_tokens = {
        "bos_token_id": tokenizer.begin_of_document if tokenizer else None,
        "eos_token_id": tokenizer.end_of_document if tokenizer else None,
    }
    _write_weights(folder, settings.shapes, names, weights, dtype, max_shard_bytes)
    generation = {name: token for name, token in special_tokens.items() if token is not None}
    with told_as_fault(folder):
        if tokenizer:
            tokenizer.copy_to(folder)
        card = model_card(model_name, settings, dtype, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
        # Last: it is what makes a folder a model to everybody else.
        config = {**architecture.config_of(settings), **special_tokens, "dtype": name_of_dtype(dtype)}
        write_json(folder / "config.json", config)


def write_json(file: Path, content: Any) -> None:
    """Indented, as all of the folder's JSON is."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_of_dtype(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def fetch(weights: Mapping[str, Weight], name: str) -> Tensor:
    """The weight itself, whether it lies there or is fetched; on the CPU."""
    weight = weights[name]
    return (weight if isinstance(weight, Tensor) else weight()).detach().cpu()


def _check_names(weights: Mapping[str, Weight], names: Mapping[str, str]) -> None:
    faults = [
        f"weight {name} is missing; the settings of the model ask for it" for name in names if name not in weights
    ]
    faults += [
        f"weight {name} is not part of the model that the settings describe" for name in weights if name not in names
    ]
    if faults:
        raise Fault(faults)


def _open_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer.open(folder)
    if tokenizer.vocabulary_size > vocabulary:
        raise Fault(
            f"{folder}: the tokenizer has {tokenizer.vocabulary_size} tokens, the model {vocabulary}; another one?"
        )
    return tokenizer


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name in names}
    shards = _shards(sizes, max_shard_bytes)
    file_of: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        is_only = len(shards) == 1
        file = "model.safetensors" if is_only else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names[name]: cast(name, fetch(weights, name), shapes[name], dtype) for name in shard}
        with told_as_fault(folder):
            save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = {"total_parameters": sum(map(math.prod, shapes.values())), "total_size": sum(sizes.values())}
        with told_as_fault(folder):
            write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": file_of})


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in their order, cut where the next would exceed the limit; a larger one is alone."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def cast(name: str, weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight as it is exported. Raises Fault if its shape is not `shape` or a value is not finite in `dtype`."""
    if tuple(weight.shape) != tuple(shape):
        raise Fault(f"weight {name} has shape {tuple(weight.shape)}; the settings of the model say {tuple(shape)}")
    exported = weight.to(dtype).contiguous()
    num_bad = int((~exported.isfinite()).sum())
    if num_bad:
        were_bad = not bool(weight.isfinite().all())
        reason = (
            "NaN or infinite" if were_bad else f"too large for {name_of_dtype(dtype)}; export as bfloat16 or float32"
        )
        raise Fault(f"weight {name}: {num_bad} of {weight.numel()} values are {reason}")
    return exported
