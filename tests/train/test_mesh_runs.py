"""`cpt train` on a mesh: the run of one rank, left and taken up on any other mesh, exported as the same model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cpt_harness import runs
from safetensors.torch import load_file

from cpt.cli import main
from cpt.engine import Engine

MODEL = {**runs.MODEL, "heads": 4, "kv_heads": 2, "head_width": 6}
# Sums in another order: measured 1e-7 in losses, norms and weights. AdamW's usual epsilon would make 7e-6 of a gradient
# that is 0 but for rounding.
TOLERANCE = 1e-6
OPTIMIZER = {"epsilon": 1e-4}
# Name: words for the command line, ranks, what the log says of the mesh.
MESHES = {
    "tensor": (["mesh.tensor=2"], 2, "data 1 x tensor 2"),
    "pipeline": (["mesh.pipeline=2", "batch.micro_batch=2"], 2, "pipeline 2 x data 1"),
    "sequence": (["mesh.sequence=2", "zero=0", "mesh.check_every_steps=1"], 2, "data 1 x sequence 2"),
    "both": (
        ["mesh.pipeline=2", "mesh.tensor=2", "mesh.sequence_parallel_norms=false", "batch.micro_batch=4"],
        4,
        "pipeline 2 x data 1 x tensor 2",
    ),
}


def write_config(data, folder: Path) -> Path:
    """Two stages of which the second replays the first, attention within documents, Reptile in between."""
    stages = [runs.stage(data, "prose", 7), runs.stage(data, "code", 5, replay={"share": 0.25})]
    methods = [{"name": "reptile", "every": 3, "step_size": 0.6}]
    plain = runs.settings(data, folder / "run", stages, methods=methods, model=MODEL, optimizer=OPTIMIZER)
    return runs.write_settings(folder / "run.yaml", plain)


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return write_config(data, tmp_path_factory.mktemp("tensor runs"))


@pytest.fixture(scope="module")
def alone(config) -> Path:
    runs.trained(config)
    return config.parent / "run"


@pytest.fixture(scope="module", params=MESHES)
def spread(config, request) -> Path:
    """The same run on one of MESHES, in a folder of its name."""
    folder, (words, ranks, mesh) = config.parent / request.param, MESHES[request.param]
    told = runs.trained(config, f"output={folder}", *words, ranks=ranks)
    assert f"on {ranks} rank(s) of cpu, {mesh};" in told
    return folder


def assert_near(found: dict, expected: dict) -> None:
    """The same story, numbers to TOLERANCE and everything else to the letter."""
    for part in ("order", "ledger", "checkpoints"):
        assert found[part] == expected[part], part
    for part in ("metrics", "scores"):
        assert len(found[part]) == len(expected[part])
        for one, other in zip(found[part], expected[part], strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                assert one[key] == (pytest.approx(value, abs=TOLERANCE) if isinstance(value, (float, dict)) else value)
    assert found["state"]["optimizer_updates"] == expected["state"]["optimizer_updates"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for kind, tensors in expected["tensors"].items():
        for name, values in tensors.items():
            assert (found["tensors"][kind][name] - values).abs().max() < TOLERANCE, (kind, name)


def test_losses_scores_order_ledger_and_checkpoints_are_those_of_one_rank(alone, spread):
    assert_near(runs.story(spread), runs.story(alone))


def test_a_run_left_on_one_mesh_goes_on_on_others(config, alone):
    folder = config.parent / "moved"
    words = (config, f"output={folder}")
    on_pipeline = (*words, "mesh.pipeline=2", "batch.micro_batch=2")
    stopped = runs.cpt("train", *on_pipeline, ranks=2, before=runs.ask_to_stop_at(3))
    assert [status for status, _ in stopped] == [143, 143]
    stopped = runs.cpt("train", *words, "mesh.sequence=2", "zero=3", ranks=2, before=runs.ask_to_stop_at(6))
    assert [status for status, _ in stopped] == [143, 143]
    stopped = runs.cpt("train", *words, "mesh.tensor=2", "zero=2", ranks=4, before=runs.ask_to_stop_at(9))
    assert [status for status, _ in stopped] == [143] * 4
    runs.trained(*on_pipeline, "mesh.tensor=2", ranks=4)
    found, expected = runs.story(folder), runs.story(alone)
    found["checkpoints"] = expected["checkpoints"]  # where it was stopped it saved, too
    assert_near(found, expected)
    assert main(["verify-order", str(folder), str(alone)]) == 0


# Ranks, ZeRO stage, windows of a micro-batch, and the rest of the words.
LEGS = [
    (1, 0, 1, []), (2, 3, 2, []), (4, 2, 2, []), (1, 1, 4, []), (4, 3, 1, ["mesh.tensor=2"]),
    (2, 1, 2, ["mesh.pipeline=2"]), (4, 0, 4, ["mesh.sequence=2"]), (1, 2, 8, []),
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_left_at_random_steps_for_other_ranks_stages_and_micro_batches_the_order_and_losses_stay(data, tmp_path, seed):
    stages = [runs.stage(data, "prose", 17), runs.stage(data, "code", 13, replay={"share": 0.25})]
    plain = runs.settings(data, tmp_path / "alone", stages, methods=["reptile"], model=MODEL, optimizer=OPTIMIZER)
    config, draw = runs.write_settings(tmp_path / "run.yaml", plain), random.Random(seed)
    runs.trained(config)
    legs = draw.sample(LEGS, len(LEGS)) if seed else LEGS
    stops = sorted(draw.sample(range(1, 28, 2), len(legs) - 1))
    for (ranks, zero, micro_batch, more), stop in zip(legs, [*stops, None], strict=True):
        words = [f"output={tmp_path}/moved", f"zero={zero}", f"batch.micro_batch={micro_batch}", *more]
        before = None if stop is None else runs.ask_to_stop_at(stop)
        ended = runs.cpt("train", config, *words, ranks=ranks, before=before)
        assert [status for status, _ in ended] == [0 if stop is None else 143] * ranks, (ranks, zero, more, ended)
    assert main(["verify-order", str(tmp_path / "moved"), str(tmp_path / "alone")]) == 0
    for mine, other in zip(*(runs.lines(tmp_path / run / "metrics.jsonl") for run in ("moved", "alone")), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5), mine["step"]


def test_on_the_same_mesh_a_run_that_was_stopped_ends_as_one_that_was_not_to_the_bit(config, spread):
    folder, (words, ranks, _) = config.parent / f"{spread.name} stopped", MESHES[spread.name]
    runs.cpt("train", config, f"output={folder}", *words, ranks=ranks, before=runs.ask_to_stop_at(5))
    runs.trained(config, f"output={folder}", *words, ranks=ranks)
    found, expected = runs.story(folder), runs.story(spread)
    found["checkpoints"] = expected["checkpoints"]
    runs.assert_same_story(found, expected)


def test_the_exported_model_is_that_of_one_rank(alone, spread, tmp_path):
    tensors = []
    for run in (alone, spread):
        assert main(["convert", "to-hf", str(run), str(tmp_path / run.name), "--dtype", "fp32"]) == 0
        tensors.append(load_file(tmp_path / run.name / "model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        assert (tensors[1][name] - values).abs().max() < TOLERANCE, name


def test_a_start_from_weights_is_that_of_one_rank(alone, data, tmp_path):
    assert main(["convert", "to-hf", str(alone), str(tmp_path / "model"), "--dtype", "fp32"]) == 0
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 2)], optimizer=OPTIMIZER)
    config = runs.write_settings(tmp_path / "run.yaml", {**plain, "model": {"from": str(tmp_path / "model")}})
    runs.trained(config)
    runs.trained(config, f"output={tmp_path}/tensor", "mesh.tensor=2", "zero=3", ranks=2)
    assert_near(runs.story(tmp_path / "tensor"), runs.story(tmp_path / "run"))
    runs.trained(config, f"output={tmp_path}/pipeline", "mesh.pipeline=2", "optimizer_state=warm(3)", ranks=2)
    runs.trained(config, f"output={tmp_path}/warm", "optimizer_state=warm(3)")
    assert_near(runs.story(tmp_path / "pipeline"), runs.story(tmp_path / "warm"))


def test_ranks_that_should_hold_the_same_are_looked_at_where_it_is_asked_for(config):
    def spoil_one_rank():
        update = Engine.step

        def step(engine, *arguments, **named):
            result = update(engine, *arguments, **named)
            if engine._mesh.rank == 1 and arguments[4].step == 2:
                piece = next(piece for piece in engine.masters.pieces if piece.name == "norm.weight")
                piece.values[0] += 1e-3
            return result

        Engine.step = step

    words = (config, "mesh.tensor=2", "mesh.check_every_steps=2")
    runs.trained(*words, f"output={config.parent}/looked", ranks=2)
    ended = runs.cpt("train", *words, f"output={config.parent}/spoiled", ranks=2, before=spoil_one_rank)
    assert [status for status, _ in ended] == [1, 1]
    # The third step spoils one copy of the last norm; in the fourth the ranks begin to differ in all that hangs on it.
    assert "after step 4 the copies of " in ended[0][1] and "differ between ranks" in ended[0][1]
    assert "Traceback" not in ended[0][1]


def test_weights_that_replicas_compute_with_are_looked_at_in_the_default_setting(config):
    def spoil_one_rank():
        update = Engine.step

        def step(engine, *arguments, **named):
            result = update(engine, *arguments, **named)
            if engine._mesh.rank == 1 and arguments[4].step == 2:
                dict(engine._model.named_parameters())["norm.weight"].data.add_(1)
            return result

        Engine.step = step

    words = (config, "mesh.check_every_steps=1", f"output={config.parent}/replicas")
    ended = runs.cpt("train", *words, ranks=2, before=spoil_one_rank)
    assert [status for status, _ in ended] == [1, 1]
    assert "after step 3 the copies of norm.weight differ between ranks" in ended[0][1]


def test_where_nothing_lies_twice_the_run_says_that_nothing_is_compared(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 1)])
    config = runs.write_settings(tmp_path / "run.yaml", {**plain, "mesh": {"check_every_steps": 1}})
    told = "mesh.check_every_steps = 1 with zero = 3 on 2 rank(s): no rank holds what another one holds; nothing is"
    assert told in runs.trained(config, "zero=3", ranks=2)
    assert "nothing is compared" not in runs.trained(config, "zero=2", f"output={tmp_path}/two", ranks=2)


@pytest.mark.parametrize(
    ("words", "ranks", "told"),
    [
        (["mesh.tensor=2"], 3, "mesh.tensor = 2 cannot cut 3 ranks; use 1, or start a multiple of 2 ranks"),
        (["mesh.pipeline=3"], 3, "mesh.pipeline = 3: model.layers = 2 cannot give each part a block; use 2"),
        (["mesh.pipeline=2", "zero=2"], 2, "zero = 2 with mesh.pipeline = 2: each part adds up the gradients of many "),
        (["mesh.pipeline=2", "mesh.blocks_of_parts=[2]"], 2, "mesh.blocks_of_parts = [2]: mesh.pipeline = 2 parts "),
        (["mesh.tensor=3"], 3, "mesh.tensor = 3 cannot split model.heads = 4 evenly; use 1, 2 or 4"),
        (["mesh.sequence=3"], 3, "mesh.sequence = 3 cannot split model.heads = 4 evenly; use 1, 2 or 4"),
        (["mesh.sequence=2", "sequence_length=13"], 2,
         "mesh.sequence = 2 cannot share sequence_length = 13 evenly; use 1, or sequence_length = 12 or 14"),
        (["mesh.tensor=2", "batch.windows=7"], 4, "batch.windows = 7 cannot be cut over 2 ranks; use 8"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_is_told_once_before_anything_is_written(data, tmp_path, words, ranks, told):
    ended = runs.cpt("train", write_config(data, tmp_path), *words, ranks=ranks)
    assert [status for status, _ in ended] == [2] * ranks
    assert told in ended[0][1] and [more for _, more in ended[1:]] == [""] * (ranks - 1)
    assert not (tmp_path / "run").exists()
