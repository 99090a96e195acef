"""Out to Hugging Face: a folder that transformers reads, written aside and renamed when it is whole.

weights --name by name, cast--> model*.safetensors + index      settings --> config.json, generation_config.json
tokenizer's files, byte for byte                                lineage  --> README.md
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.config.faults import Fault
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface.card import model_card
from cpt.huggingface.exported import Exported
from cpt.huggingface.origin import Origin
from cpt.huggingface.readers import count_not_finite, name_of_dtype
from cpt.huggingface.shards import INDEX, Shards, new_shards, shards_as_they_lay
from cpt.tensor_writer import DTYPES as STORED_DTYPES
from cpt.tensor_writer import Writer, in_order

# What a request may call the type of the exported weights.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


@contextlib.contextmanager
def aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name at the end of the block, and vanishes if the block fails.

    Raises Fault if `output` is in use: anything but an empty folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise Fault(f"{output} is in use; name a folder that is not there yet, or remove it")
    # In a folder of its own, so that it has its name from the beginning: what is written inside may repeat it.
    folder = output.parent / f".{output.name}.aside-{os.getpid()}" / output.name
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
        shutil.rmtree(folder.parent, ignore_errors=True)


@contextlib.contextmanager
def told_as_fault(output: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written becomes one line."""
    try:
        yield
    except OSError as error:
        raise Fault(f"{output} cannot be written: {error.strerror or error}") from error


def write_folder(
    folder: Path,
    exported: Exported,
    tokenizer_folder: Path | None,
    max_shard_bytes: int | None,
    lineage: Mapping[str, Any] | None,
    origin: Origin | None = None,
) -> None:
    """Fill an existing folder, a few MiB in memory at a time.

    `origin`: the layout to keep, unless `max_shard_bytes` asks for another. Raises Fault for weights that do not fit
    the settings or are not finite, for a tokenizer that does not fit the model, and for what a disk may answer.
    """
    vocabulary = exported.settings.vocabulary
    tokenizer = None if tokenizer_folder is None else open_tokenizer(tokenizer_folder, vocabulary)
    # null, where there is none: for a line that is missing transformers takes 1 and 2.
    special_tokens = {
        "bos_token_id": tokenizer.begin_of_document if tokenizer else None,
        "eos_token_id": tokenizer.end_of_document if tokenizer else None,
    }
    tensors = {theirs: (exported.dtype(theirs), exported.shape(theirs)) for theirs in exported.tensors}
    shards = shards_as_they_lay(origin, tensors) if origin and max_shard_bytes is None else None
    shards = shards or new_shards(tensors, max_shard_bytes or DEFAULT_MAX_SHARD_BYTES)
    check_room(folder, shards.num_bytes)
    _write_weights(folder, exported, shards)
    generation = {name: token for name, token in special_tokens.items() if token is not None}
    with told_as_fault(folder):
        if tokenizer:
            tokenizer.copy_to(folder)
        card = model_card(exported.model_name, exported.settings, exported.main_dtype, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if origin and origin.generation_config:
            (folder / "generation_config.json").write_text(origin.generation_config, encoding="utf-8")
        else:
            write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
        # Last: it is what makes a folder a model to everybody else.
        write_json(
            folder / "config.json", {**exported.config, **special_tokens, "dtype": name_of_dtype(exported.main_dtype)}
        )


def stored_dtypes(origin: Origin) -> dict[str, torch.dtype]:
    """The type that each tensor had in the folder that was imported."""
    return {name: STORED_DTYPES[stored_as] for name, stored_as in origin.dtypes.items()}


def write_json(file: Path, content: Any) -> None:
    """Indented, as all of the folder's JSON is."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer of a model with `vocabulary` rows; Fault if it may ask for rows that are not there."""
    tokenizer = Tokenizer.open(folder)
    if tokenizer.vocabulary_size > vocabulary:
        raise Fault(
            f"{folder}: the tokenizer has {tokenizer.vocabulary_size} tokens, the model {vocabulary}; another one?"
        )
    return tokenizer


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise Fault if the disk has not so many bytes left."""
    num_free = shutil.disk_usage(folder).free
    if num_bytes > num_free:
        raise Fault(
            f"{folder} cannot be written: the weights need {num_bytes / 1e6:,.1f} MB, the disk has"
            f" {num_free / 1e6:,.1f} MB left"
        )


def _write_weights(folder: Path, exported: Exported, shards: Shards) -> None:
    with told_as_fault(folder):
        for file, layout in shards.layouts.items():
            with Writer(folder / file, layout) as writer:
                for theirs in in_order(layout):
                    writer.write(theirs, _finite(exported, theirs))
        if shards.index is not None:
            (folder / INDEX).write_text(shards.index, encoding="utf-8")


def _finite(exported: Exported, theirs: str) -> Callable[[int, Tensor], None]:
    reader = exported.reader(theirs)

    def read_into(start: int, out: Tensor) -> None:
        reader.read_into(start, out)
        if count_not_finite(out):
            raise exported.fault_of(theirs)

    return read_into
