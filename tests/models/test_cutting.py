"""A model cut by its table: all ranks' parts are the whole; sizes that do not fit are told with those that do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpt_harness.parity import LLAMAS, PYTHIAS

from cpt.config import beside, build
from cpt.models.layers.cutting import cut, faults_of_cut, num_parameters_on_a_rank
from cpt.parallel.mesh import Group
from cpt.parallel.parts import parts_of
from cpt_kernels import Settings, choose

LLAMA, PYTHIA = LLAMAS["grouped heads"], dataclasses.replace(PYTHIAS["parallel"], heads=6)  # 6 heads, 88 wide inside
ALL = {
    "grouped heads": LLAMA,
    "one head for all": LLAMAS["one head for all"],
    "all biases": LLAMAS["all biases"],
    "tied": LLAMAS["tied"],
    "wide heads": LLAMAS["wide heads"],
    "pythia": PYTHIA,
}


def cut_for(settings, rank: int, size: int) -> torch.nn.Module:
    """One rank's part of a model, without memory."""
    with torch.device("meta"):
        model = build(settings, "Model", choose(Settings(), torch.device("cpu")))
        return cut(model, beside(settings, "CUTS"), Group(rank, size))


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("variant", ALL)
def test_first_copies_hold_every_element_once_and_all_ranks_are_of_one_size(variant, size):
    settings = dataclasses.replace(ALL[variant], mlp_width=24)
    if faults_of_cut(settings, size):
        assert (variant, size) in {("grouped heads", 3), ("all biases", 3), ("tied", 3), ("wide heads", 3)}
        return
    ranks = [cut_for(settings, rank, size) for rank in range(size)]
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in ranks]
    assert shapes == [shapes[0]] * size
    for name, whole in settings.shapes.items():
        parts = [parts_of(model).get(name) for model in ranks]
        if parts[0] is None:
            assert shapes[0][name] == whole, "norms, and biases that are added after a sum"
            continue
        firsts = [part for part in parts if part.is_first_copy]
        elements = torch.zeros(whole)
        for part in firsts:
            elements.narrow(part.dimension, part.first, part.last - part.first).add_(1)
        assert (elements == 1).all() and {part.shape for part in parts} == {whole}
        assert sum(part.num_elements for part in firsts) == math.prod(whole)
    assert parts_of(ranks[0]).keys() >= {"embedding.weight", "blocks.1.mlp.down.weight"}
    assert sum(map(math.prod, shapes[0].values())) == num_parameters_on_a_rank(
        settings, beside(settings, "CUTS"), size, [range(settings.layers)]
    )


def test_ranks_that_share_a_key_head_have_the_queries_that_ask_it():
    settings = dataclasses.replace(LLAMA, heads=8, kv_heads=2, head_width=6)
    for rank in range(4):
        parts = parts_of(cut_for(settings, rank, 4))
        queries, keys = (parts[f"blocks.0.attention.{name}.weight"] for name in ("query", "key"))
        assert (queries.first // 6, queries.last // 6) == (2 * rank, 2 * rank + 2)
        assert (keys.first // 6, keys.last // 6) == (rank // 2, rank // 2 + 1)
        assert keys.is_first_copy == (rank % 2 == 0)


@pytest.mark.parametrize(
    ("changes", "size", "told"),
    [
        ({"heads": 12}, 5, "mesh.tensor = 5 cannot split model.heads = 12 evenly; use 1, 2 or 4"),
        ({"heads": 12, "kv_heads": 4}, 6,
         "mesh.tensor = 6 cannot split model.kv_heads = 4 evenly, nor share each among as many ranks; use 1, 2 or 4"),
        ({"heads": 12, "kv_heads": 12}, 3,
         "mesh.tensor = 3 cannot split the width 88 of the feed-forward layers evenly; use 1, 2 or 4"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_told_with_those_that_do(changes, size, told):
    settings = dataclasses.replace(LLAMA, **changes)
    assert faults_of_cut(settings, size) == [told]
    for fitting in (1, 2, 4):
        assert faults_of_cut(settings, fitting) == []


def test_any_vocabulary_can_be_cut():
    assert faults_of_cut(dataclasses.replace(LLAMA, vocabulary=131), 2) == []
