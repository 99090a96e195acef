"""Random numbers depend on where we are; a place in the grid knows what it is."""

from __future__ import annotations

import os

import pytest
import torch

from cpt.config import Fault, read_settings
from cpt.parallel.mesh import Mesh, Settings, threads_for
from cpt.parallel.seeds import derive_seed, seed_step


def test_seeds_are_the_same_in_every_version():
    """The order of data of every run of the past depends on them. Never change these."""
    assert derive_seed(1, "epoch", 0) == 969330063997039101
    assert derive_seed(0) == 3581690635855307741
    assert derive_seed("prose") == 2858308779188494511


def test_other_parts_make_another_seed():
    parts = [(1,), (2,), ("1",), (1, 2), (12,), ("1", 2), (1, "2"), ("12",), (1, ""), ("",), (), (-1,), (2, 1)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_seeds_fit_into_63_bits_and_use_them():
    seeds = [derive_seed("x", number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert 0 <= min(seeds) < 2**56 < 2**62 < max(seeds) < 2**63


def numbers_of(seed: int, step: int, rank: int) -> list[float]:
    seed_step(seed, step, rank)
    return torch.rand(4).tolist()


def test_a_step_draws_the_same_whenever_it_is_made():
    first = numbers_of(1, 5, 0)
    torch.rand(100)
    assert numbers_of(1, 5, 0) == first


def test_other_steps_ranks_and_seeds_draw_other_numbers():
    places = [(1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0), (5, 1, 0), (1, 0, 5)]
    assert len({tuple(numbers_of(*place)) for place in places}) == len(places)


def test_a_lone_rank_needs_nobody():
    mesh = Mesh(0, 1, 0, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert mesh.sum(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert mesh.any(True) is True
    assert mesh.any(False) is False
    mesh.wait()


def test_every_rank_is_a_data_rank_and_the_first_tells_the_story():
    places = [Mesh(rank, 3, rank, torch.device("cpu")) for rank in range(3)]
    assert [place.data_rank for place in places] == [0, 1, 2]
    assert [place.data_size for place in places] == [3, 3, 3]
    assert [place.is_first for place in places] == [True, False, False]


@pytest.mark.parametrize(
    ("cores", "local_size", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1), (4, 0, 4)]
)
def test_ranks_of_a_machine_share_its_cores(monkeypatch, cores, local_size, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert threads_for(local_size) == threads


@pytest.mark.parametrize("axis", ["pipeline", "sequence", "tensor"])
@pytest.mark.parametrize("size", [2, 0, -1])
def test_an_axis_that_cannot_be_cut_yet_is_a_fault(axis, size):
    with pytest.raises(Fault) as caught:
        read_settings(Settings, {axis: size})
    assert str(caught.value) == f"{axis} = {size}: this version cuts along data only; use 1"


def test_all_faults_of_the_mesh_are_told_at_once():
    with pytest.raises(Fault) as caught:
        read_settings(Settings, {"pipeline": 2, "tensor": 2, "timeout_seconds": 0})
    assert len(caught.value.lines) == 3
    assert "timeout_seconds = 0: at least 1" in caught.value.lines
