"""What is saved on one mesh and ZeRO stage is loaded on any other, bit for bit, and training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint, Content, save, write, write_checkpoint
from cpt.checkpoint.damage import damage_of
from cpt.config import Fault
from cpt.methods import reptile
from cpt.parallel.together import OtherRankError
from cpt.parallel.weights import MOMENTS

# (ZeRO stage, ranks); those saved under and those loaded under.
SAVED = [(zero, ranks) for ranks in (1, 2) for zero in (0, 1, 2, 3)]
LOADED = [(0, 1), (3, 1), (0, 2), (1, 2), (3, 2), (2, 3), (3, 3)]
KINDS = ("master", *MOMENTS, "method/reptile/anchor")


def start(mesh, zero: int, **settings):
    methods = [reptile.Method(reptile.Settings(every=2, step_size=0.5))]
    return tiny.start_engine(mesh, zero=zero, windows=12, methods=methods, **settings), methods[0]


def everything(engine, method) -> dict:
    """This rank's fragments of each kind, and the numbers beside them."""
    pieces = engine.masters.pieces
    anchor = method.state_dict()["anchor"]
    kinds = {"master": tiny.fragments(engine), **{kind: tiny.fragments(engine, kind) for kind in MOMENTS}}
    kinds["method/reptile/anchor"] = [
        (p.name, p.shape, p.start, values.clone()) for p, values in zip(pieces, anchor, strict=True)
    ]
    return {**kinds, "numbers": [engine.masters.num_updates, method.state_dict()["updates_since"]]}


def joined(of_ranks: list[dict]) -> dict:
    return {**{kind: tiny.join([one[kind] for one in of_ranks]) for kind in KINDS}, "numbers": of_ranks[0]["numbers"]}


def assert_same(found: dict, expected: dict) -> None:
    assert found["numbers"] == expected["numbers"]
    for kind in KINDS:
        assert found[kind].keys() == expected[kind].keys()
        for name in expected[kind]:
            assert torch.equal(found[kind][name], expected[kind][name]), (kind, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint after three steps for each (ZeRO stage, ranks) of SAVED, and what the engines held."""
    folder = tmp_path_factory.mktemp("saved")
    held = {}
    for ranks in (1, 2):

        def work(mesh):
            told = []
            for zero, ranks in SAVED:
                if ranks == mesh.size:
                    engine, method = start(mesh, zero)
                    tiny.take_steps(engine, mesh, 0, 3, number=12)
                    engine.save(folder / f"{zero}-{ranks}", {"note": "kept"})
                    told.append(everything(engine, method))
            return told

        here = [case for case in SAVED if case[1] == ranks]
        held.update(zip(here, (joined(list(one)) for one in zip(*on_ranks(ranks, work), strict=True)), strict=True))
    return folder, held


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_masters_moments_counts_and_anchor_are_the_same_on_any_mesh_and_stage(saved, ranks):
    folder, held = saved
    stages = [zero for zero, number in LOADED if number == ranks]

    def work(mesh):
        told = []
        for zero in stages:
            for case in SAVED:
                engine, method = start(mesh, zero, fill=False)
                checkpoint = Checkpoint(folder / f"{case[0]}-{case[1]}")
                assert checkpoint.state["note"] == "kept"
                engine.load(checkpoint, with_optimizer=True, with_methods=True)
                told.append(everything(engine, method))
        return told

    cases = [case for _ in stages for case in SAVED]
    for case, of_ranks in zip(cases, zip(*on_ranks(ranks, work), strict=True), strict=True):
        assert_same(joined(list(of_ranks)), held[case])


def test_on_the_same_mesh_the_next_steps_are_the_same_bit_for_bit_and_on_another_to_rounding(saved):
    folder, _ = saved

    def unbroken(mesh):
        engine, _ = start(mesh, 1)
        return [r.loss for r in tiny.take_steps(engine, mesh, 0, 8, number=12)][3:]

    def resumed(mesh):
        told = []
        for zero in (1, 3):
            engine, _ = start(mesh, zero, fill=False)
            engine.load(Checkpoint(folder / "1-1"), with_optimizer=True, with_methods=True)
            told.append([r.loss for r in tiny.take_steps(engine, mesh, 3, 8, number=12)])
        return told

    expected = on_ranks(1, unbroken)[0]
    assert on_ranks(1, resumed)[0][0] == expected
    for losses in (*on_ranks(1, resumed)[0], *on_ranks(2, resumed)[0]):
        assert losses == pytest.approx(expected, abs=2e-6)


def test_weights_alone_begin_with_zero_moments_no_updates_and_a_new_anchor(saved):
    folder, held = saved

    def work(mesh):
        engine, method = start(mesh, 1)
        tiny.take_steps(engine, mesh, 0, 2, number=12)
        method.load_state_dict({"anchor": None, "updates_since": 0})
        engine.load(Checkpoint(folder / "0-2"), with_optimizer=False, with_methods=False)
        moments = max(float(p.moments[kind].abs().max()) for p in engine.masters.pieces for kind in MOMENTS)
        return moments, engine.masters.num_updates, tiny.fragments(engine), method.state_dict() == {}

    moments, updates, masters, is_new = on_ranks(1, work)[0]
    assert (moments, updates, is_new) == (0.0, 0, True)
    for name, values in tiny.join([masters]).items():
        assert torch.equal(values, held[(0, 2)]["master"][name])


def test_the_files_are_safetensors_and_json_and_hold_no_rank_but_in_their_names(saved):
    folder, held = saved
    for zero, ranks in SAVED:
        place = folder / f"{zero}-{ranks}"
        pieces = [f"pieces-{rank:05d}.safetensors" for rank in range(ranks)]
        assert sorted(p.name for p in place.iterdir()) == ["checksums.json", "index.json", *pieces, "state.json"]
        assert sorted(json.loads((place / "checksums.json").read_text())) == ["index.json", *pieces, "state.json"]
        checkpoint = Checkpoint(place)
        assert damage_of(place) == []
        assert checkpoint.kinds == sorted(KINDS)
        assert checkpoint.shapes == {name: tuple(value.shape) for name, value in held[(zero, ranks)]["master"].items()}
        for name, values in checkpoint.weights().items():
            assert torch.equal(values, held[(zero, ranks)]["master"][name])
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_any_part_of_a_parameter_can_be_read_across_the_seams_between_pieces(saved):
    folder, held = saved
    checkpoint = Checkpoint(folder / "3-2")
    flat = held[(3, 2)]["exp_avg"]["embedding.weight"].reshape(-1)
    for first, last in ((0, 1), (700, 760), (731, 733), (len(flat) - 1, len(flat)), (5, 5)):
        assert torch.equal(checkpoint.read("exp_avg", "embedding.weight", first, last), flat[first:last])


FULL = OSError(28, "no space left on device")


@pytest.mark.parametrize(
    ("when", "error"),
    [("begin", FULL), ("pieces", FULL), ("pieces", RuntimeError("no space left for something else")), ("finish", FULL)],
    ids=str,
)
def test_a_save_that_fails_on_one_rank_raises_on_all_and_leaves_the_one_before_and_nothing_else(
    tmp_path, monkeypatch, when, error
):
    def fail(*arguments, **named):
        raise error

    def work(mesh):
        engine, _ = start(mesh, 1)
        tiny.take_steps(engine, mesh, 0, 1, number=12)
        engine.save(tmp_path / "step-00000001", {})
        if when == "pieces" and mesh.rank == 1:
            monkeypatch.setattr(write, "Writer", fail)
        if when == "finish" and mesh.rank == 0:
            monkeypatch.setattr(save, "join_parts", fail)
        if when == "begin" and mesh.rank == 0:
            monkeypatch.setattr(Path, "mkdir", fail)
        try:
            engine.save(tmp_path / "step-00000002", {})
        except OSError as raised:
            return str(raised)
        return "not raised"

    told = on_ranks(2, work, seconds=20)
    rank = 1 if when == "pieces" else 0
    assert len(set(told)) == 1 and f"step-00000002 could not be written: rank {rank}: " in told[0], told
    assert "space left" in told[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint(tmp_path / "step-00000001")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    def work(mesh):
        engine, _ = start(mesh, 1)
        for note in ("first", "second"):
            tiny.take_steps(engine, mesh, 0, 1, number=12)
            engine.save(tmp_path / "step-00000001", {"note": note})

    on_ranks(2, work)
    assert Checkpoint(tmp_path / "step-00000001").state["note"] == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 30}, "embedding.weight is [61, 24], the model wants [61, 30]"),
        ({"layers": 3}, "blocks.2.attention.query.weight is missing, the model wants [24, 24]"),
        ({"layers": 1}, "blocks.1.attention.query.weight is [24, 24], the model has none"),
        ({"tied": True}, "head.weight is [61, 24], the model has none"),
    ],
    ids=str,
)
def test_a_model_of_other_shapes_is_refused_on_every_rank_alike(saved, monkeypatch, change, told):
    import dataclasses

    folder, _ = saved
    monkeypatch.setattr(tiny, "LLAMA", dataclasses.replace(tiny.LLAMA, **change))

    def work(mesh):
        engine, _ = start(mesh, 1)  # where most parameters lie whole on one of the two ranks
        try:
            engine.load(Checkpoint(folder / "3-2"), with_optimizer=True, with_methods=True)
        except Fault as fault:
            return list(fault.lines)
        except OtherRankError as error:
            return [str(error)]
        return ["not refused"]

    first, second = on_ranks(2, work, seconds=20)
    assert second == ["rank 0 failed and says why"]
    assert any(told in line and "settings of the run that the checkpoint is from" in line for line in first), first
    assert len(first) <= 9


def test_moments_that_were_never_saved_cannot_be_kept(tmp_path, saved):
    def work(mesh):
        engine, _ = start(mesh, 1)
        pieces = engine.masters.pieces
        write_checkpoint(tmp_path / "bare", Content(pieces, {"master": [p.values for p in pieces]}, {}), mesh)
        with pytest.raises(Fault, match="holds no moments .*optimizer_state: reset"):
            engine.load(Checkpoint(tmp_path / "bare"), with_optimizer=True, with_methods=False)

    on_ranks(1, work)


def test_pieces_that_do_not_cover_a_parameter_are_told(tmp_path):
    def work(mesh):
        engine, _ = start(mesh, 1)
        pieces = engine.masters.pieces[1:]
        write_checkpoint(tmp_path / "half", Content(pieces, {"master": [p.values[:-1] for p in pieces]}, {}), mesh)

    on_ranks(1, work)
    checkpoint = Checkpoint(tmp_path / "half")
    name = next(iter(checkpoint.shapes))
    with pytest.raises(Fault, match=f"master of {name} has .* of the .* elements asked for"):
        checkpoint._tensors["master"][name]["pieces"].pop()
        checkpoint.read("master", name)
