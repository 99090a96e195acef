"""What is saved on one number of tensor ranks is loaded on any other, to the bit: weights, moments, counts, anchor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, build
from cpt.methods import reptile
from cpt.models import pythia
from cpt.parallel.weights import MOMENTS
from cpt_kernels import Settings, choose

# Odd vocabulary, so that there is padding; fewer key heads than four ranks; biases of every cut in Pythia.
LLAMA = dataclasses.replace(tiny.LLAMA, layers=1, heads=4, kv_heads=2, head_width=6, mlp_width=20)
PYTHIA = pythia.Settings(
    vocabulary=61, width=24, layers=1, heads=4, mlp_width=20, rotary_share=0.5, longest_sequence=16, tied=True
)
MODELS = {"llama": LLAMA, "pythia": PYTHIA}
# Model, ranks, tensor ranks, ZeRO stage: those saved under; and (ranks, tensor, ZeRO stage) of those loaded under.
SAVED = [("llama", *mesh) for mesh in ((1, 1, 1), (2, 1, 3), (2, 2, 0), (2, 2, 3), (4, 2, 1), (4, 4, 1))]
SAVED += [("pythia", *mesh) for mesh in ((1, 1, 1), (2, 2, 1))]
LOADED = [(1, 1, 0), (2, 2, 1), (2, 2, 3), (4, 2, 0), (4, 4, 1)]
KINDS = ("master", *MOMENTS, "method/reptile/anchor")


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


def name_of(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    """A checkpoint after three steps for each case of SAVED, and what the engines held."""
    folder, held = tmp_path_factory.mktemp("saved"), {}
    for ranks, tensor in dict.fromkeys(case[1:3] for case in SAVED):
        cases = [case for case in SAVED if case[1:3] == (ranks, tensor)]

        def work(mesh, cases=cases):
            told = []
            for case in cases:
                engine, method = start(mesh, case[3], case[0])
                tiny.take_steps(engine, mesh, 0, 3)
                engine.save(folder / name_of(case), {"note": "kept"})
                told.append(everything(engine, method))
            return told

        of_cases = zip(*on_ranks(ranks, work, tensor=tensor), strict=True)
        held.update(zip(cases, (joined(list(of_ranks)) for of_ranks in of_cases), strict=True))
    return folder, held


@pytest.mark.parametrize(("ranks", "tensor"), dict.fromkeys(at[:2] for at in LOADED))
def test_everything_is_the_same_on_any_mesh(saved, ranks, tensor):
    folder, held = saved
    cases = [(at, case) for at in LOADED if at[:2] == (ranks, tensor) for case in SAVED]

    def work(mesh):
        told = []
        for at, case in cases:
            engine, method = start(mesh, at[2], case[0], fill=False)
            engine.load(Checkpoint(folder / name_of(case)), with_optimizer=True, with_methods=True)
            told.append(everything(engine, method))
        return told

    for (_, case), of_ranks in zip(cases, zip(*on_ranks(ranks, work, tensor=tensor), strict=True), strict=True):
        found, expected = joined(list(of_ranks)), held[case]
        assert found["numbers"] == expected["numbers"]
        for kind in KINDS:
            assert found[kind].keys() == expected[kind].keys()
            for name in expected[kind]:
                assert torch.equal(found[kind][name], expected[kind][name]), (case, kind, name)


def test_every_element_is_written_once_and_can_be_read_in_any_part(saved):
    folder, held = saved
    for case, kinds in held.items():
        checkpoint = Checkpoint(folder / name_of(case))
        assert checkpoint.shapes == MODELS[case[0]].shapes
        index = json.loads((checkpoint.folder / "index.json").read_text())["tensors"]
        for kind in KINDS:
            for name, whole in kinds[kind].items():
                pieces = index[kind][name]["pieces"]
                assert sum(stop - start for start, stop, *_ in pieces) == whole.numel(), (case, kind, name)
                assert torch.equal(checkpoint.read(kind, name), whole.reshape(-1))
        flat = kinds["master"]["blocks.0.mlp.down.weight"].reshape(-1)
        for start, stop in ((0, 1), (3, 50), (19, 20), (20, 41), (5, 5), (len(flat) - 1, len(flat))):
            assert torch.equal(checkpoint.read("master", "blocks.0.mlp.down.weight", start, stop), flat[start:stop])


def test_masters_and_anchor_equal_those_of_one_process(saved):
    _, held = saved
    for case, kinds in held.items():
        for kind in ("master", "method/reptile/anchor"):
            for name, expected in held[case[0], 1, 1, 1][kind].items():
                assert (kinds[kind][name] - expected).abs().max() < 2e-6, (case, kind, name)


def test_reptile_tells_the_same_displacement_on_every_mesh():
    def work(mesh):
        told = []
        for zero in (0, 1, 3):
            engine, _ = start(mesh, zero, "llama")
            tiny.take_steps(engine, mesh, 0, 2)
            told.append(engine.report()["method/reptile/displacement"])
        return told

    expected = on_ranks(1, work)[0]
    for ranks, tensor in ((2, 2), (4, 2), (4, 4)):
        for told in on_ranks(ranks, work, tensor=tensor):
            assert told == pytest.approx(expected, rel=1e-5)


def test_columns_that_are_missing_are_told(saved, tmp_path):
    folder, _ = saved
    checkpoint = Checkpoint(folder / "llama-2-2-3")
    pieces = checkpoint._tensors["master"]["blocks.0.mlp.down.weight"]["pieces"]
    del pieces[-1]
    with pytest.raises(Fault, match=r"master of blocks.0.mlp.down.weight has 240 of the 480 elements asked for"):
        checkpoint.read("master", "blocks.0.mlp.down.weight")
