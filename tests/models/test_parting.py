"""A model cut between its layers: parts that cost alike, and that together are the whole."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cpt_harness.parity import LLAMAS, PYTHIAS

from cpt.config import beside, build
from cpt.models import llama
from cpt.models.layers.cutting import num_parameters_on_a_rank
from cpt.models.layers.parting import blocks_of_parts, faults_of_parts, head_in_blocks, keep_part, ranges_of
from cpt.parallel.mesh import Group
from cpt_kernels import Settings, choose


def counts(settings, num_parts: int, sequence_length: int = 2048) -> list[int]:
    parts = blocks_of_parts(settings, sequence_length, num_parts)
    assert [index for part in parts for index in part] == list(range(settings.layers))
    return [len(part) for part in parts]


# Llama 3 8B: a block has 218M weights in its products, attention adds 4096 x 2048; the head 525M.
EIGHT = llama.Settings(vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336)


def test_a_head_costs_as_its_products_do():
    of_a_block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096 * 2048
    assert head_in_blocks(EIGHT, 2048) == pytest.approx(128256 * 4096 / of_a_block) == pytest.approx(2.32, abs=0.01)
    assert head_in_blocks(EIGHT, 65536) < 1.2  # attention over long windows costs more, the head does not


@pytest.mark.parametrize(
    ("num_parts", "expected"), [(1, [32]), (2, [17, 15]), (4, [8, 9, 9, 6]), (8, [4, 4, 4, 4, 4, 5, 5, 2])]
)
def test_the_last_part_has_fewer_blocks_because_it_has_the_head(num_parts, expected):
    assert counts(EIGHT, num_parts) == expected


@pytest.mark.parametrize("layers", range(2, 12))
@pytest.mark.parametrize("vocabulary", [8, 4000, 40000])
def test_no_other_cut_has_a_faster_slowest_part(layers, vocabulary):
    settings = llama.Settings(vocabulary=vocabulary, width=64, layers=layers, heads=4)
    head = head_in_blocks(settings, 128)
    for num_parts in range(2, min(layers, 4) + 1):
        found = counts(settings, num_parts, 128)
        assert min(found) >= 1
        every = (
            [last - first for first, last in itertools.pairwise((0, *borders, layers))]
            for borders in itertools.combinations(range(1, layers), num_parts - 1)
        )
        best = min(max(*counts[:-1], counts[-1] + head) for counts in every)
        assert max(*found[:-1], found[-1] + head) == best


@pytest.mark.parametrize(
    ("layers", "num_parts", "told", "fault"),
    [
        (3, 4, None, "mesh.pipeline = 4: model.layers = 3 cannot give each part a block; use 3"),
        (4, 2, (1, 2, 1), "mesh.blocks_of_parts = [1, 2, 1]: mesh.pipeline = 2 parts need as many numbers"),
        (4, 2, (1, 2), "mesh.blocks_of_parts = [1, 2]: the sum is 3, model.layers = 4; each at least 1, "
                       "together all layers"),
        (4, 2, (4, 0), "mesh.blocks_of_parts = [4, 0]: the sum is 4, model.layers = 4; each at least 1, "
                       "together all layers"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_are_told(layers, num_parts, told, fault):
    assert faults_of_parts(layers, num_parts, told) == [fault]


def test_parts_that_can_be_are_no_faults():
    assert faults_of_parts(4, 2, (3, 1)) == faults_of_parts(4, 4, None) == faults_of_parts(4, 1, None) == []
    assert ranges_of((3, 1)) == [range(3), range(3, 4)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [LLAMAS["grouped heads"], PYTHIAS["parallel"]], ids=["llama", "pythia"])
def test_parts_together_are_the_model_and_compute_what_it_computes(settings, tied):
    settings = dataclasses.replace(settings, layers=3, tied=tied)
    kernels = choose(Settings(), torch.device("cpu"))
    whole = build(settings, "Model", kernels)
    whole.initialise(1)
    parts = [keep_part(build(settings, "Model", kernels), range(i, i + 1), Group(i, 3)) for i in range(3)]
    found: dict[str, int] = {}
    for part in parts:
        part.initialise(1)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name))
            found[name] = found.get(name, 0) + 1
        shapes = {name: tuple(p.shape) for name, p in part.named_parameters()} | part.shapes_elsewhere
        assert shapes == settings.shapes
    assert found == {name: 2 if tied and name == "embedding.weight" else 1 for name in settings.shapes}
    tokens = torch.randint(0, settings.vocabulary, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = parts[1](tokens[:, :-1], hidden=parts[0](tokens[:, :-1]))
    losses = parts[2](tokens[:, :-1], tokens[:, 1:], hidden=hidden)
    assert torch.equal(losses, whole(tokens[:, :-1], tokens[:, 1:]))
    numbers = [sum(p.numel() for p in part.parameters()) for part in parts]
    ranges = [range(i, i + 1) for i in range(3)]
    assert num_parameters_on_a_rank(settings, beside(settings, "CUTS"), 1, ranges) == max(numbers)
