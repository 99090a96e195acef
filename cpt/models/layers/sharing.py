"""A model that is written for whole windows becomes one that computes some of their positions: two steps are exchanged.

    model --share_positions(model, group)--> the same model; call it as before, it returns losses of its own positions

All weights stay on every rank. Works on top of `cutting`: the heads of a tensor rank are shared once more.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from cpt.models.layers.attention import Mix
from cpt.parallel.mesh import Group, divisors, one_of
from cpt.parallel.sequence import AttentionOverRanks, PositionsHere


def faults_of_sharing(settings: Any, sequence_length: int, sequence: int, tensor: int) -> list[str]:
    """Why `sequence` ranks cannot share windows of a model on `tensor` ranks each, with the numbers that would do."""
    heads = settings.heads // tensor
    faults = []
    if heads % sequence:
        of_a_rank = f" / mesh.tensor = {heads} of a tensor rank" if tensor > 1 else ""
        faults.append(
            f"mesh.sequence = {sequence} cannot split model.heads = {settings.heads}{of_a_rank} evenly; "
            f"use {one_of(divisors(heads))}"
        )
    if sequence_length % sequence:
        below = sequence_length // sequence * sequence
        fitting = [n for n in (below, below + sequence) if n >= 2]
        faults.append(
            f"mesh.sequence = {sequence} cannot share sequence_length = {sequence_length} evenly; "
            f"use {one_of(divisors(math.gcd(sequence_length, heads)))}, or sequence_length = {one_of(fitting)}"
        )
    return faults


def share_positions(model: nn.Module, group: Group) -> nn.Module:
    """Exchange, in `model` itself, what is different where ranks of `group` share each window; returns `model`.

    The settings must be without `faults_of_sharing`.
    """
    model.positions_here = PositionsHere(group)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Mix):
                setattr(parent, name, AttentionOverRanks(layer, group))
    return model
