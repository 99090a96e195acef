"""What is saved on one mesh is loaded on any other, to the bit: weights, moments, counts, Reptile's anchor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import Case, case
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.checkpoint.damage import damage_of
from cpt.config import Fault, build
from cpt.methods import reptile
from cpt.models import pythia
from cpt.parallel.weights import MOMENTS
from cpt_kernels import Settings, choose

# Odd vocabulary, so that there is padding; fewer key heads than four ranks; biases of every cut in Pythia; tied.
LLAMA = dataclasses.replace(tiny.LLAMA, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=20)
PYTHIA = pythia.Settings(
    vocabulary=61, width=24, layers=2, heads=4, mlp_width=20, rotary_share=0.5, longest_sequence=16, tied=True
)
MODELS = {"llama": LLAMA, "pythia": PYTHIA}
KINDS = ("master", *MOMENTS, "method/reptile/anchor")


def meshes(model: str) -> list[Case]:
    """Every mesh of 1, 2 and 4 ranks that a checkpoint may come from and go to, with every ZeRO stage it can have."""
    found = [case(model, ranks, zero) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)]
    found += [case(model, ranks, zero, tensor=2) for ranks in (2, 4) for zero in (0, 1, 2, 3)]
    found += [case(model, 4, zero, tensor=4) for zero in (0, 1, 2, 3)]
    found += [case(model, ranks, zero, pipeline=2) for ranks in (2, 4) for zero in (0, 1)]
    found += [case(model, 2, zero, sequence=2) for zero in (0, 1, 2, 3)]
    found += [case(model, 4, zero, sequence=2, tensor=2) for zero in (1, 3)]
    return found + [case(model, 4, zero, pipeline=2, tensor=2) for zero in (0, 1)]


# What the short tests go between.
SAVED = [case("llama", 1, 1), case("llama", 2, 3), case("llama", 4, 1, tensor=2), case("llama", 2, 0, pipeline=2)]
SAVED += [case("pythia", 1, 1), case("pythia", 4, 3, sequence=2, tensor=2)]
LOADED = [case("any", 1, 0), case("any", 2, 3, tensor=2), case("any", 2, 3, sequence=2)]
LOADED += [case("any", 4, 1, tensor=4), case("any", 4, 0, pipeline=2, tensor=2)]


def start(mesh, zero: int, model: str, **more):
    method = reptile.Method(reptile.Settings(every=2, step_size=0.5))

    def make():
        return build(MODELS[model], "Model", choose(Settings(), torch.device("cpu")))

    # With AdamW's usual epsilon a gradient that is 0 but for rounding, as of Pythia's key biases, moves weights.
    return tiny.start_engine(mesh, zero=zero, methods=[method], model=make, epsilon=1e-4, **more), method


def everything(engine, method) -> dict:
    anchor = tiny.fragments_of(engine.masters.pieces, method.state_dict()["anchor"])
    kinds = {"master": tiny.fragments(engine), **{kind: tiny.fragments(engine, kind) for kind in MOMENTS}}
    numbers = [engine.masters.num_updates, method.state_dict()["updates_since"]]
    return {**kinds, "method/reptile/anchor": anchor, "numbers": numbers}


def joined(of_ranks: list[dict]) -> dict:
    """Whole tensors; fails where ranks that hold the same elements hold other values."""
    return {**{kind: tiny.join([one[kind] for one in of_ranks]) for kind in KINDS}, "numbers": of_ranks[0]["numbers"]}


def folder_of(one: Case) -> str:
    return "-".join([one.model, str(one.ranks), *(f"{axis}{size}" for axis, size in one.axes), f"zero{one.zero}"])


def saved_on(cases: Sequence[Case], folder: Path) -> dict[Case, dict]:
    """A checkpoint in `folder` after three steps for each case, and what the engines held."""
    held = {}
    for ranks, axes in dict.fromkeys((one.ranks, one.axes) for one in cases):
        here = [one for one in cases if (one.ranks, one.axes) == (ranks, axes)]

        def work(mesh, here=here):
            told = []
            for one in here:
                engine, method = start(mesh, one.zero, one.model)
                tiny.take_steps(engine, mesh, 0, 3)
                engine.save(folder / folder_of(one), {"note": "kept"})
                told.append(everything(engine, method))
            return told

        of_cases = zip(*on_ranks(ranks, work, **dict(axes)), strict=True)
        held.update(zip(here, (joined(list(of_ranks)) for of_ranks in of_cases), strict=True))
    return held


def assert_loaded_on(to: Sequence[Case], folder: Path, held: dict[Case, dict], seconds: float = 60.0) -> int:
    """Load every checkpoint on all of `to`, which are of one mesh; how many were the same to the bit: all."""
    cases = [(at, one) for at in to for one in held if at.model in ("any", one.model)]

    def work(mesh):
        told, made = [], {}
        for at, one in cases:
            # Making engines takes most of the time; the first load of each meets one that was never used.
            is_new = (at.zero, one.model) not in made
            if is_new:
                made = {(at.zero, one.model): start(mesh, at.zero, one.model, fill=False)}
            engine, method = made[at.zero, one.model]
            engine.load(Checkpoint(folder / folder_of(one)), with_optimizer=True, with_methods=True)
            assert engine.differing_copies() == []
            # Of each engine's first load, whole tensors are put together; the others are compared where they lie.
            told.append(everything(engine, method) if is_new else None)
            if not is_new:
                assert_same_pieces(engine, method, held[one], f"{one} on {at}")
        return told

    of_ranks = on_ranks(to[0].ranks, work, seconds, **dict(to[0].axes))
    for (at, one), of_case in zip(cases, zip(*of_ranks, strict=True), strict=True):
        if None in of_case:
            continue
        found, expected = joined(list(of_case)), held[one]
        assert found["numbers"] == expected["numbers"]
        for kind in KINDS:
            assert found[kind].keys() == expected[kind].keys()
            for name in expected[kind]:
                assert torch.equal(found[kind][name], expected[kind][name]), (str(at), str(one), kind, name)
    return len(cases)


def assert_same_pieces(engine, method, expected: dict, told: str) -> None:
    """What this rank holds is its part of the whole tensors, to the bit."""
    pieces = engine.masters.pieces
    held = {"master": [p.values for p in pieces], **{kind: [p.moments[kind] for p in pieces] for kind in MOMENTS}}
    held["method/reptile/anchor"] = method.state_dict()["anchor"]
    assert [engine.masters.num_updates, method.state_dict()["updates_since"]] == expected["numbers"], told
    for kind, tensors in held.items():
        for piece, tensor in zip(pieces, tensors, strict=True):
            part = piece.take(lambda name, start, stop, kind=kind: expected[kind][name].reshape(-1)[start:stop])
            assert torch.equal(tensor.reshape(-1), part.reshape(-1)), (told, kind, piece.name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[Case, dict]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, saved_on(SAVED, folder)


@pytest.mark.parametrize("mesh", dict.fromkeys((at.ranks, at.axes) for at in LOADED), ids=str)
def test_everything_is_the_same_on_any_mesh(saved, mesh):
    assert assert_loaded_on([at for at in LOADED if (at.ranks, at.axes) == mesh], *saved) >= len(SAVED)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_reads_what_every_other_has_written(tmp_path, model, tell):
    every = meshes(model)
    held, number = saved_on(every, tmp_path), 0
    for mesh in dict.fromkeys((at.ranks, at.axes) for at in every):
        number += assert_loaded_on([at for at in every if (at.ranks, at.axes) == mesh], tmp_path, held, seconds=600.0)
    assert number == len(every) ** 2
    tell(f"{model}: {len(every)} meshes x ZeRO stages, {number} ways from one to another, all to the bit")


def test_every_element_is_written_once_and_can_be_read_in_any_part(saved):
    folder, held = saved
    for one, kinds in held.items():
        checkpoint = Checkpoint(folder / folder_of(one))
        assert checkpoint.shapes == MODELS[one.model].shapes
        assert damage_of(checkpoint.folder) == []
        index = json.loads((checkpoint.folder / "index.json").read_text())["tensors"]
        for kind in KINDS:
            for name, whole in kinds[kind].items():
                pieces = index[kind][name]["pieces"]
                assert sum(stop - start for start, stop, *_ in pieces) == whole.numel(), (str(one), kind, name)
                assert torch.equal(checkpoint.read(kind, name), whole.reshape(-1))
        flat = kinds["master"]["blocks.0.mlp.down.weight"].reshape(-1)
        for start, stop in ((0, 1), (3, 50), (19, 20), (20, 41), (5, 5), (len(flat) - 1, len(flat))):
            assert torch.equal(checkpoint.read("master", "blocks.0.mlp.down.weight", start, stop), flat[start:stop])


def test_masters_and_anchor_equal_those_of_one_process(saved):
    _, held = saved
    for one, kinds in held.items():
        for kind in ("master", "method/reptile/anchor"):
            for name, expected in held[case(one.model, 1, 1)][kind].items():
                assert (kinds[kind][name] - expected).abs().max() < 2e-6, (str(one), kind, name)


def test_reptile_tells_the_same_displacement_on_every_mesh():
    def work(mesh):
        told = []
        for zero in (0, 1) if mesh.pipeline.size > 1 else (0, 1, 3):
            engine, _ = start(mesh, zero, "llama")
            tiny.take_steps(engine, mesh, 0, 2)
            told.append(engine.report()["method/reptile/displacement"])
        return told

    expected = on_ranks(1, work)[0]
    others = [(2, {"tensor": 2}), (4, {"tensor": 2}), (4, {"tensor": 4}), (2, {"sequence": 2})]
    for ranks, axes in (*others, (4, {"pipeline": 2, "tensor": 2})):
        for told in on_ranks(ranks, work, **axes):
            assert told == pytest.approx(expected[: len(told)], rel=1e-5)


def test_columns_that_are_missing_are_told(saved):
    folder, _ = saved
    checkpoint = Checkpoint(folder / folder_of(case("llama", 4, 1, tensor=2)))
    pieces = checkpoint._tensors["master"]["blocks.0.mlp.down.weight"]["pieces"]
    del pieces[-1]
    with pytest.raises(Fault, match=r"master of blocks.0.mlp.down.weight has 240 of the 480 elements asked for"):
        checkpoint.read("master", "blocks.0.mlp.down.weight")
