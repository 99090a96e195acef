"""Random numbers depend on where we are; a place in the grid knows what it is."""

from __future__ import annotations

import os

import pytest
import torch
from cpt_harness.ranks import on_ranks

from cpt.config import Fault, read_settings
from cpt.parallel.mesh import Mesh, Settings, open_mesh, threads_for
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
@pytest.mark.parametrize("size", [0, -1])
def test_an_axis_without_ranks_is_a_fault(axis, size):
    with pytest.raises(Fault) as caught:
        read_settings(Settings, {axis: size})
    assert str(caught.value) == f"{axis} = {size}: at least 1"


def test_all_faults_of_the_mesh_are_told_at_once():
    with pytest.raises(Fault) as caught:
        read_settings(Settings, {"pipeline": 0, "tensor": 0, "timeout_seconds": 0, "check_every_steps": 0})
    assert len(caught.value.lines) == 4
    assert "check_every_steps = 0: at least 1; leave it out to never look" in caught.value.lines
    assert "timeout_seconds = 0: at least 1" in caught.value.lines
    assert "tensor = 0: at least 1" in caught.value.lines


@pytest.mark.parametrize(
    ("tensor", "ranks", "told"),
    [(3, 4, "use 1, 2 or 4"), (2, 1, "use 1"), (4, 6, "use 1, 2, 3 or 6"), (2, 3, "use 1 or 3")],
)
def test_a_tensor_axis_that_does_not_divide_the_ranks_gets_the_values_that_do(tensor, ranks, told):
    told_whole = f"mesh.tensor = {tensor} cannot cut {ranks} ranks; {told}, or start a multiple of {tensor} ranks"
    assert Settings(tensor=tensor).faults_on(ranks) == [told_whole]
    offered = [int(word) for word in told.replace(",", "").split() if word.isdigit()]
    assert [Settings(tensor=value).faults_on(ranks) for value in offered] == [[]] * len(offered)


def test_of_the_values_that_divide_the_ranks_only_those_are_offered_that_the_model_allows():
    settings, others = Settings(tensor=2), "start a multiple of 2 ranks"
    (told,) = settings.faults_on(9, lambda changed: changed.tensor != 9)
    assert told == f"mesh.tensor = 2 cannot cut 9 ranks; use 1 or 3, or {others}"
    assert settings.faults_on(9, lambda changed: False) == [f"mesh.tensor = 2 cannot cut 9 ranks; {others}"]


@pytest.mark.parametrize(
    ("axes", "length", "is_shared"),
    [({}, 12, False), ({"tensor": 2}, 12, True), ({"tensor": 2}, 13, False), ({"tensor": 2, "sequence": 4}, 12, False)],
)
def test_tensor_ranks_share_norms_where_they_divide_the_positions(axes, length, is_shared):
    assert Settings(**axes).shares_norms(length) == is_shared
    assert not Settings(**axes, sequence_parallel_norms=False).shares_norms(length)
    assert (Settings(**axes, sequence_parallel_norms=True).faults_of_norms(length) == []) == is_shared


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({}, " with mesh.tensor = 1: it is the ranks of a tensor group that share norms; leave it out"),
        ({"tensor": 2}, ": mesh.tensor = 2 cannot share sequence_length = 13 evenly; use 12 or 14, or leave it out"),
        ({"tensor": 4, "sequence": 2},
         ": mesh.tensor = 4 x mesh.sequence = 2 cannot share sequence_length = 13 evenly; use 8 or 16, "
         "or leave it out"),
        ({"tensor": 16}, ": mesh.tensor = 16 cannot share sequence_length = 13 evenly; use 16, or leave it out"),
    ],
)  # fmt: skip
def test_norms_that_cannot_be_shared_are_told_with_the_lengths_that_could(axes, told):
    settings = Settings(**axes, sequence_parallel_norms=True)
    assert settings.faults_of_norms(13) == [f"mesh.sequence_parallel_norms = true{told}"]
    assert Settings(**axes).faults_of_norms(13) == []


def test_a_mesh_that_cannot_be_is_refused_before_the_ranks_meet():
    place = {"rank": 0, "size": 3, "local_rank": 0, "local_size": 3, "address": "127.0.0.1", "port": 1}
    with pytest.raises(Fault, match="mesh.tensor = 2 cannot cut 3 ranks"), open_mesh(Settings(tensor=2), **place):
        pass


def test_neighbours_are_a_tensor_group_and_see_the_same_windows():
    def work(mesh):
        ones = torch.tensor([float(mesh.rank), 1.0])
        groups = [torch.distributed.get_process_group_ranks(group.handle) for group in (mesh.tensor, mesh.data)]
        place = [mesh.data_rank, mesh.data_size, mesh.tensor.rank, mesh.tensor.size]
        return place, groups, mesh.sum_over_data(ones).tolist(), mesh.any(mesh.rank == 3)

    told = on_ranks(4, work, tensor=2)
    assert [place for place, *_ in told] == [[0, 2, 0, 2], [0, 2, 1, 2], [1, 2, 0, 2], [1, 2, 1, 2]]
    assert [groups for _, groups, *_ in told] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]
    assert [total for *_, total, _ in told] == [[2.0, 2.0]] * 4  # of ranks 0 and 2
    assert all(found for *_, found in told)


def test_axes_that_do_not_fit_together_are_told_with_the_products_that_do():
    assert Settings(tensor=2, pipeline=2).faults_on(6) == [
        "mesh.pipeline = 2 x mesh.tensor = 2 = 4 cannot cut 6 ranks; make their product 1, 2, 3 or 6, "
        "or start a multiple of 4 ranks"
    ]
    assert Settings(tensor=2, pipeline=2).faults_on(8) == []
    assert Settings(tensor=2, pipeline=2, sequence=2).data_size(16) == 2


def test_every_axis_has_the_ranks_that_differ_along_it_only():
    def work(mesh):
        groups = (mesh.pipeline, mesh.data, mesh.sequence, mesh.tensor, mesh.replicas, mesh.ends)
        ranks = [group.handle and torch.distributed.get_process_group_ranks(group.handle) for group in groups]
        places = [group.rank for group in groups]
        assert all(one is None or one[place] == mesh.rank for one, place in zip(ranks, places, strict=True))
        total = mesh.sum_over_data(torch.tensor([10.0**mesh.rank], dtype=torch.float64)).item()
        return [ranks, [group.size for group in groups], mesh.is_first_part, mesh.is_last_part, total]

    told = on_ranks(8, work, pipeline=2, sequence=2, tensor=2)
    assert told[5] == [[[1, 5], [5], [5, 7], [4, 5], [5, 7], [1, 5]], [2, 1, 2, 2, 2, 2], False, True, 1.0]
    told = on_ranks(8, work, sequence=2, tensor=2)
    assert told[5] == [[None, [1, 5], [5, 7], [4, 5], [1, 3, 5, 7], None], [1, 2, 2, 2, 4, 1], True, True, 10001.0]
    told = on_ranks(6, work, pipeline=3)
    assert told[0][0] == [[0, 2, 4], [0, 1], None, None, [0, 1], [0, 4]]
    assert told[3][0] == [[1, 3, 5], [2, 3], None, None, [2, 3], None]  # in the middle
    assert [one[-1] for one in told] == [11.0] * 6
