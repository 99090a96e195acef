"""A model cut between its layers: which blocks a part of the pipeline has, and a model that has these only.

    embedding  block 0  block 1 | block 2  block 3 | block 4  norm  head      three parts; the last has the head's cost

S sequence length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from cpt.parallel.mesh import Group
from cpt.parallel.parts import parts_of, whole


def blocks_of_parts(settings: Any, sequence_length: int, num_parts: int) -> list[range]:
    """The blocks of each part, so that the slowest part is as fast as can be; every part has at least one.

    Blocks cost alike. The head costs as its products do; the embedding, which is looked up, nothing.
    """
    if num_parts == 1:
        return [range(settings.layers)]
    head = head_in_blocks(settings, sequence_length)
    before = num_parts - 1

    def slowest(in_last: int) -> float:
        return max(-(-(settings.layers - in_last) // before), in_last + head)

    # Of equally good ones the fullest last part: the first ones keep activations of more micro-batches.
    in_last = min(range(settings.layers - before, 0, -1), key=slowest)
    counts = [(settings.layers - in_last + place) // before for place in range(before)]
    return ranges_of([*counts, in_last])


def head_in_blocks(settings: Any, sequence_length: int) -> float:
    """What the head costs, in blocks: floating-point operations of a token's forward pass in windows of S tokens."""
    head = settings.vocabulary * settings.width
    of_blocks = sum(math.prod(s) for n, s in settings.shapes.items() if n.startswith("blocks.") and len(s) == 2)
    attention = settings.heads * settings.width_of_head * sequence_length  # causal: half of 2 products of 2 x K x S
    return head / (of_blocks / settings.layers + attention)


def ranges_of(counts: list[int] | tuple[int, ...]) -> list[range]:
    """Neighbouring blocks in so many to a part."""
    stops = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def faults_of_parts(layers: int, num_parts: int, told: tuple[int, ...] | None) -> list[str]:
    """Why `layers` blocks cannot be cut into `num_parts`, or not into as many to a part as `told`."""
    if num_parts > layers:
        return [f"mesh.pipeline = {num_parts}: model.layers = {layers} cannot give each part a block; use {layers}"]
    if told is None:
        return []
    name = f"mesh.blocks_of_parts = [{', '.join(map(str, told))}]"
    if len(told) != num_parts:
        return [f"{name}: mesh.pipeline = {num_parts} parts need as many numbers"]
    if min(told) < 1 or sum(told) != layers:
        return [f"{name}: the sum is {sum(told)}, model.layers = {layers}; each at least 1, together all layers"]
    return []


def keep_part(model: nn.Module, blocks: range, pipeline: Group) -> nn.Module:
    """Take away from `model` what other ranks of the pipeline have; returns it.

    A tied embedding stays on the last part too, which computes the logits with it. `shapes_elsewhere` of the model
    are the whole shapes of what was taken away.
    """
    is_first, is_last = pipeline.rank == 0, pipeline.rank == pipeline.size - 1
    for index in list(model.blocks):
        if int(index) not in blocks:
            del model.blocks[index]
    if not is_last:
        model.norm = model.head = None
    if not is_first and not (is_last and model.settings.tied):
        model.embedding = None
    elif not is_first:
        shape = model.settings.shapes["embedding.weight"]
        part = parts_of(model).get("embedding.weight") or whole(shape, True)
        model.embedding.parts = model.head.parts = {"weight": dataclasses.replace(part, is_first_copy=False)}
    here = dict(model.named_parameters())
    model.shapes_elsewhere = {name: shape for name, shape in model.settings.shapes.items() if name not in here}
    return model
