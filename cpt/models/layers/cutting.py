"""A model that is written for one device becomes one rank's part of it: its layers are exchanged, by its table of cuts.

    model, CUTS --cut(model, cuts, group)--> the same model with this rank's rows and columns; call it as before

Which part lies here is for `cpt.parallel.parts.parts_of` to tell; weights are then filled by whole name and element.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cpt.models.layers.cuts import Cut, cut_of
from cpt.models.layers.head import Head
from cpt.models.layers.parting import keep_part
from cpt.models.layers.sharing import share_positions
from cpt.parallel.mesh import Group, Mesh, divisors, one_of
from cpt.parallel.parts import Part
from cpt.parallel.tensor import BETWEEN_POSITIONS, WHOLE, ColumnLinear, RowLinear, Stream
from cpt.parallel.vocabulary import VocabularyEmbedding, VocabularyHead
from cpt_kernels.cross_entropy import of_a_slice


def faults_of_cut(settings: Any, size: int) -> list[str]:
    """Why a model cannot be cut over `size` ranks of a tensor group, with the sizes that would do."""
    fitting = [n for n in divisors(settings.heads) if _misfit(settings, n) is None]
    misfit = _misfit(settings, size)
    return [] if misfit is None else [f"mesh.tensor = {size} cannot split {misfit}; use {one_of(fitting)}"]


def _misfit(settings: Any, size: int) -> str | None:
    """The first count that so many ranks cannot share. Fewer key and value heads than ranks are held more than once."""
    if settings.heads % size:
        return f"model.heads = {settings.heads} evenly"
    if settings.num_kv_heads % size and size % settings.num_kv_heads:
        return f"model.kv_heads = {settings.num_kv_heads} evenly, nor share each among as many ranks"
    if settings.width_of_mlp % size:
        return f"the width {settings.width_of_mlp} of the feed-forward layers evenly"
    return None


def num_parameters_on_a_rank(settings: Any, cuts: Mapping[str, Cut], size: int, parts: Sequence[range]) -> int:
    """Weights on the rank that has the most: on the first of `size` of a tensor group, of the largest of `parts`."""
    ends = {"embedding.weight": {0}, "norm": {len(parts) - 1}, "head": {len(parts) - 1}}
    if settings.tied:
        ends["embedding.weight"] = {0, len(parts) - 1}
    of_parts = [0] * len(parts)
    for name, shape in settings.shapes.items():
        whole, cut = math.prod(shape), cut_of(name, cuts)
        share = size if cut != "whole" else 1
        if name.rsplit(".", 2)[-2] in ("key", "value"):
            share = min(size, settings.num_kv_heads)
        number = -(-shape[0] // size) * math.prod(shape[1:]) if cut == "vocabulary" else whole // share
        index = re.match(r"blocks\.(\d+)\.", name)
        owners = (
            {i for i, blocks in enumerate(parts) if int(index[1]) in blocks}
            if index
            else ends[name if name in ends else name.split(".")[0]]
        )
        for owner in owners:
            of_parts[owner] += number
    return max(of_parts)


def built_part(
    make: Callable[[], nn.Module], cuts: Mapping[str, Cut], mesh: Mesh, blocks: range, shares_norms: bool = False
) -> nn.Module:
    """This rank's part of the model that `make` makes, on the CPU; `blocks` are those of its part of the pipeline.

    `shares_norms` is as in `cut`.
    Memory is taken for the part only, and no random values are drawn: weights mean nothing until they are filled.
    """
    with torch.device("meta"):
        model = make()
        if mesh.tensor.size > 1:
            model = cut(model, cuts, mesh.tensor, shares_norms)
        if mesh.sequence.size > 1:
            model = share_positions(model, mesh.sequence)
        if mesh.pipeline.size > 1:
            model = keep_part(model, blocks, mesh.pipeline)
    model.materialise(torch.device("cpu"))
    return model


def cut(model: nn.Module, cuts: Mapping[str, Cut], group: Group, shares_norms: bool = False) -> nn.Module:
    """Exchange, in `model` itself, what its table cuts for what this rank of `group` has of it; returns `model`.

    `shares_norms`: each rank has some positions of what is between cut layers, which are norms and the residual
    stream; the group's size must divide the positions of a forward pass.
    Weights are not set: fill them, and let padding be 0. The settings must be without `faults_of_cut`.
    """
    stream = BETWEEN_POSITIONS if shares_norms else WHOLE
    for path, parent in list(model.named_modules()):
        exchanged = [
            _exchange(parent, name, layer, cut_of(f"{path}.{name}.weight".removeprefix("."), cuts), group, stream)
            for name, layer in parent.named_children()
            if isinstance(layer, (nn.Linear, nn.Embedding, Head))
        ]
        if "column" in exchanged:
            # Here and not in each of its layers: one sum of gradients for all of them.
            parent.register_forward_pre_hook(lambda _, inputs: (stream.enter(inputs[0], group), *inputs[1:]))
    tied_to = model.embedding.weight if model.settings.tied else None
    by = of_a_slice(model.head.kernels.linear_cross_entropy)
    model.head = VocabularyHead(model.head.weight, group, tied_to, stream, by)
    if shares_norms:
        for path, layer in model.named_modules():
            names = [name for name, _ in layer.named_parameters(recurse=False)]
            layer.used_for_some_positions = {name: group for name in names if cut_of(f"{path}.{name}", cuts) == "whole"}
    return model


def _exchange(parent: nn.Module, name: str, layer: nn.Module, word: Cut, group: Group, stream: Stream) -> Cut:
    """Put this rank's part in the place of a layer; returns how it was cut."""
    if isinstance(layer, nn.Embedding):
        setattr(parent, name, VocabularyEmbedding(layer, group, stream))
    elif word == "column":
        # What has heads is cut between them.
        part, num_copies = _columns(layer.weight, getattr(parent, "head_width", 1), group)
        setattr(parent, name, ColumnLinear(layer, part, group, num_copies))
    elif word == "row":
        width = layer.in_features // group.size
        part = Part(tuple(layer.weight.shape), 1, group.rank * width, (group.rank + 1) * width)
        setattr(parent, name, RowLinear(layer, part, group, stream))
    return word


def _columns(weight: Tensor, unit: int, group: Group) -> tuple[Part, int]:
    """This rank's rows of a column-cut weight, in whole units, and how many ranks have the same."""
    num_units = weight.shape[0] // unit
    num_copies = max(1, group.size // num_units)
    units_here = max(1, num_units // group.size)
    first = group.rank // num_copies * units_here * unit
    part = Part(tuple(weight.shape), 0, first, first + units_here * unit, group.rank % num_copies == 0)
    return part, num_copies
