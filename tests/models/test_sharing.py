"""Windows shared by ranks: sizes that do not fit are told with those that do; a model keeps all its weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness.parity import LLAMAS

from cpt.config import build
from cpt.models.layers.sharing import faults_of_sharing, share_positions
from cpt.parallel.mesh import Group
from cpt.parallel.sequence import AttentionOverRanks, PositionsHere
from cpt_kernels import Settings, choose

LLAMA = dataclasses.replace(LLAMAS["grouped heads"], heads=12, kv_heads=4)


@pytest.mark.parametrize(
    ("length", "sequence", "tensor", "told"),
    [
        (2048, 5, 1, ["mesh.sequence = 5 cannot split model.heads = 12 evenly; use 1, 2, 3, 4, 6 or 12",
                      "mesh.sequence = 5 cannot share sequence_length = 2048 evenly; use 1, 2 or 4, "
                      "or sequence_length = 2045 or 2050"]),
        (2048, 4, 2, ["mesh.sequence = 4 cannot split model.heads = 12 / mesh.tensor = 6 of a tensor rank evenly; "
                      "use 1, 2, 3 or 6"]),
        (2047, 2, 1, ["mesh.sequence = 2 cannot share sequence_length = 2047 evenly; use 1, "
                      "or sequence_length = 2046 or 2048"]),
        (3, 4, 1, ["mesh.sequence = 4 cannot share sequence_length = 3 evenly; use 1 or 3, or sequence_length = 4"]),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_told_with_those_that_do(length, sequence, tensor, told):
    assert faults_of_sharing(LLAMA, length, sequence, tensor) == told


@pytest.mark.parametrize(("sequence", "tensor"), [(1, 1), (4, 1), (6, 1), (12, 1), (3, 2), (1, 12)])
def test_key_heads_need_not_be_divided(sequence, tensor):
    assert faults_of_sharing(LLAMA, 2040, sequence, tensor) == []


def test_every_rank_keeps_all_weights_under_their_names():
    with torch.device("meta"):
        whole, shared = (build(LLAMA, "Model", choose(Settings(), torch.device("cpu"))) for _ in range(2))
    shared = share_positions(shared, Group(1, 2))
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (whole, shared)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert isinstance(shared.positions_here, PositionsHere)
    assert all(isinstance(block.attention.mix, AttentionOverRanks) for block in shared.blocks.values())
