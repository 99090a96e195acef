"""A model's logits without the model in memory: each module's weights are read when it is called, and dropped after.

    tokens -> embedding (only the rows asked for) -> block -> ... -> block -> hidden -> head, some rows at a time

So a model of any size computes within the memory of its largest module. The code that computes is the model's own, ours
or that of transformers: it is built on no memory, and hooks put the weights in.
N windows, S positions, D width, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpt.config.faults import Fault
from cpt.huggingface import architectures
from cpt.huggingface.load import stored_files
from cpt.huggingface.readers import Cast, Reader, reader_of, whole
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

# Several models take turns with a part each, so it is far smaller than a layer.
_HEAD_BYTES = 8 << 20


class Forward:
    """A model whose logits can be had piece by piece. `read`: its weights by their names in `model`, in any type."""

    def __init__(self, model: nn.Module, head: nn.Module, read: Callable[[str], Reader]) -> None:
        self._model, self._head, self._read = model.eval(), head, read
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._take_rows)
                module.register_forward_hook(_drop)
            elif module is not head and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._take)
                module.register_forward_hook(_drop)
        # The model ends in its hidden states; the head is applied to them in parts.
        head.forward = lambda hidden, *_, **__: hidden

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head is given, [N, S, D] fp32, for tokens [N, S]."""
        out = self._model(tokens)
        return out if isinstance(out, Tensor) else out.logits

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first token, logits [N, S, part of V]) until the vocabulary is through; hidden [N, S, D]."""
        readers = {name: self._reader(parameter) for name, parameter in self._head.named_parameters(recurse=False)}
        num_rows, width = readers["weight"].shape
        step = max(1, min(_HEAD_BYTES // (4 * width), _HEAD_BYTES // (4 * hidden[..., 0].numel())))
        held = _held(self._head)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            for name, reader in readers.items():
                size = 1 if len(reader.shape) == 1 else width
                rows = reader.read(first * size, last * size).float().view(last - first, *reader.shape[1:])
                self._head._parameters[name] = nn.Parameter(rows, requires_grad=False)
            yield first, type(self._head).forward(self._head, hidden)
        self._head._parameters.update(held)

    def _reader(self, parameter: Tensor) -> Reader:
        return self._read(self._names[id(parameter)])

    def _take(self, module: nn.Module, _: Any) -> None:
        module._held = _held(module)
        for name, parameter in module._held.items():
            values = whole(Cast(self._reader(parameter), torch.float32))
            module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def _take_rows(self, module: nn.Embedding, given: tuple[Tensor]) -> tuple[Tensor]:
        """A table of only the tokens that are asked for, and where they stand in it."""
        module._held = _held(module)
        reader = self._reader(module._held["weight"])
        width = reader.shape[1]
        tokens, places = given[0].unique(return_inverse=True)
        rows = torch.stack([reader.read(token * width, (token + 1) * width).float() for token in tokens.tolist()])
        module.padding_idx = None  # it is checked against the number of rows, and matters to gradients alone
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        return (places,)


def of_ours(model_name: str, settings: Any, read: Callable[[str], Reader]) -> Forward:
    """Our model; `read` gives each weight by its name."""
    with torch.device("meta"):
        model = importlib.import_module(f"cpt.models.{model_name}").Model(
            settings, choose(KernelSettings(all="plain"), torch.device("cpu"))
        )
    return Forward(model, model.head, read)


def of_folder(folder: Path, in_layers: bool) -> Forward:
    """The model that transformers makes of a Hugging Face folder, from nothing but the folder.

    `in_layers`: built on no memory, its weights read by their stored names as they are needed; otherwise transformers
    itself loads it. Raises Fault if it misses or does not know a tensor of the folder.
    """
    if in_layers:
        model = _built_on_no_memory(folder)
        tensors = stored_files(folder).tensors
        stored = {in_memory: tensors[name] for name, in_memory in names_in_memory(model, tensors).items()}
        _check_names(folder, model, stored)
        return Forward(model, model.get_output_embeddings(), stored.__getitem__)
    model = _loaded(folder)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Forward(model, model.get_output_embeddings(), lambda name: reader_of(parameters, name))


def _loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    had_progress_bar = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if had_progress_bar:
        their_logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[kind]:
            raise Fault(f"{folder}: transformers reports {kind.replace('_', ' ')}: {min(map(str, told[kind]))}")
    return model


def _built_on_no_memory(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    # Rotary frequencies are computed and not stored, so they are computed again, on the CPU.
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config))
    return model


def names_in_memory(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Their name of each tensor in files -> in memory, where transformers calls some of them otherwise."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5 both names are the same
        return {name: name for name in stored}
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    names = {}
    for name in stored:
        names[name] = name
        for renaming in renamings:
            names[name], _ = renaming.rename_source_key(names[name])
    return names


def _check_names(folder: Path, model: nn.Module, stored: Mapping[str, Reader]) -> None:
    """The model's parameters and the folder's tensors, in shape too; what is computed or tied may be there besides."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in stored:
            raise Fault(f"{folder}: transformers reports missing keys: {name}")
        if tuple(parameter.shape) != tuple(stored[name].shape):
            raise Fault(f"{folder}: transformers reports mismatched keys: {name}")
    tied = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    _, architecture = architectures.of_config(model.config.to_dict(), str(folder / "config.json"))
    for name in stored:
        if name not in tied and name not in buffers and not architecture.is_no_weight(name):
            raise Fault(f"{folder}: transformers reports unexpected keys: {name}")


def _held(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def _drop(module: nn.Module, *_: Any) -> None:
    module._parameters.update(module._held)
    del module._held
