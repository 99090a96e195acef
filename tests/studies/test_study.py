"""The studies: their cells, what a cell trains, what scale does, the table by hand, and a whole one on made-up text."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from cpt_harness.runs import write_tokenizer

from cpt.config import Fault, read_mapping, read_settings
from cpt.run.reading import run_of

FOLDER = Path(__file__).parents[2] / "configs" / "studies"
FILES = ["replay", "reptile"]


@pytest.fixture(scope="module")
def study():
    specification = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["study"] = module  # dataclasses look up their module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["study"]


def read(study, name, *words):
    return read_settings(study.Study, read_mapping([str(FOLDER / f"{name}.yaml"), *words]))


def test_a_cell_without_replay_is_there_once_whatever_is_counted(study):
    cells = read(study, "replay", "new=[de]", "replay=[0%,25%]").cells()
    assert [(cell.share, cell.accounting) for cell in cells] == [
        ("0%", ""), ("25%", "adds_to_new"), ("25%", "replaces_new"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_cell_has_a_folder_of_its_own(study, name):
    names = [cell.name for cell in read(study, name).cells()]
    assert len(set(names)) == len(names)


def test_what_both_studies_train_is_trained_once(study, tmp_path):
    replay, reptile = read(study, "replay"), read(study, "reptile")
    common = {cell.name: cell for cell in replay.cells()}.keys() & {cell.name: cell for cell in reptile.cells()}.keys()
    assert len(common) == 3
    for name in common:
        runs = [
            study.child_settings(one, tmp_path, FOLDER, next(c for c in one.cells() if c.name == name), seed=1)
            for one in (replay, reptile)
        ]
        assert runs[0] == runs[1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("scale", [1, 100])
def test_all_runs_of_a_study_are_runs(study, tmp_path, name, scale):
    one = read(study, name, f"scale={scale}")
    base = study.base_settings(one, tmp_path, FOLDER, seed=2)
    parent = Path(base["output"])
    parent.mkdir(parents=True)
    (parent / "run.yaml").write_text(yaml.safe_dump(base))
    for cell in one.cells():
        run = run_of(study.child_settings(one, tmp_path, FOLDER, cell, seed=2))
        assert (run.seed, list(run.stages[0].sources), run.output.name) == (2, [cell.new], cell.name)
        assert float(run.stages[0].replay.share if run.stages[0].replay else 0) == float(cell.share[:-1]) / 100
        assert list(run.evaluation.held_out) == [cell.new, "en"]


def test_scale_16_is_four_times_the_tokens_for_twice_the_width_at_half_the_rate(study, tmp_path):
    plain, large = (
        study.base_settings(read(study, "replay", f"scale={scale}"), tmp_path, FOLDER, seed=1) for scale in (1, 16)
    )
    assert plain["stages"][0]["tokens"] == "600K"
    assert large["stages"][0]["tokens"] == 2_400_000
    assert [large["model"][name] for name in ("width", "mlp_width", "heads", "kv_heads")] == [128, 384, 8, 4]
    assert [float(large["stages"][0]["schedule"][name]) for name in ("peak", "floor")] == [2e-3, 2e-4]


def test_the_table_by_hand(study):
    one = study.Study("en", ("de",), ("0%", "25%"), ("adds_to_new",), {"plain": (), "slow": ()}, (1, 2))
    losses = {("0%", "plain"): (2.0, 1.5), ("0%", "slow"): (2.5, 0.5), ("25%", "plain"): (2.25, 0.25),
              ("25%", "slow"): (2.75, -0.25)}  # fmt: skip
    results = {
        (cell, seed): study.Result(
            new_tokens=300,
            tokens=300 if cell.share == "0%" else 400,
            new_loss=new + seed / 8,
            change=change,
            retained=(new + seed / 8 + 4 + change) / 2,
            intervals=(0.02 * seed, 0.03),
        )
        for cell in one.cells()
        for seed in one.seeds
        for new, change in [losses[cell.share, cell.arm]]
    }
    assert "\n".join(study.tables(one, results)).strip().splitlines() == [
        "From en to de:",
        "",
        "| replay | arm | new tokens | tokens in all | loss on de | change of en | retained | ± en, de"
        " | retained less plain's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0% | plain | 300 | 300 | 2.188 (2.125 to 2.250) | +1.500 (+1.500 to +1.500) | 3.844 (3.812 to 3.875)"
        " | 0.040, 0.030 |  |",
        "| 0% | slow | 300 | 300 | 2.688 (2.625 to 2.750) | +0.500 (+0.500 to +0.500) | 3.594 (3.562 to 3.625)"
        " | 0.040, 0.030 | -0.250 (-0.250 to -0.250) |",
        "| 25%, equal new tokens | plain | 300 | 400 | 2.438 (2.375 to 2.500) | +0.250 (+0.250 to +0.250)"
        " | 3.344 (3.312 to 3.375) | 0.040, 0.030 |  |",
        "| 25%, equal new tokens | slow | 300 | 400 | 2.938 (2.875 to 3.000) | -0.250 (-0.250 to -0.250)"
        " | 3.344 (3.312 to 3.375) | 0.040, 0.030 | +0.000 (+0.000 to +0.000) |",
        "",
        "Nats a token; mean over seeds 1, 2 (lowest to highest); ±: of single losses, half the 95 % interval over "
        "documents.",
    ]


BASE = """
output: base
model: {name: llama, vocabulary: 300, width: 16, layers: 1, heads: 2, kv_heads: 1, mlp_width: 16}
sequence_length: 16
precision: fp32
batch: {windows: 4}
stages: [{name: en, tokens: 192, sources: {}, schedule: {name: constant, peak: 1e-3}}]
evaluation: {windows: 4}
"""
CHILD = """
output: child
parent: {run: base}
precision: fp32
batch: {windows: 4}
stages: [{name: de, tokens: 192, sources: {}, schedule: {name: constant, peak: 1e-3}}]
evaluation: {windows: 4}
"""
STUDY = """
{old: en, new: [de], replay: [25%], accounting: [adds_to_new], arms: {plain: []}, seeds: [1], tokenizer: tokenizer}
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with text in two languages, a tokenizer and a study of two runs."""
    folder = tmp_path_factory.mktemp("texts")
    write_tokenizer(folder / "tokenizer")
    numbers = random.Random(1)
    for language, words in (("en", ["the", "quick", "fox"]), ("de", ["brown", "jumps", "lazy", "dog"])):
        (folder / "corpus" / language).mkdir(parents=True)
        for part in ("train", "valid"):
            documents = [" ".join(numbers.choices(words, k=60)) for _ in range(8)]
            text = "".join(json.dumps({"text": one}) + "\n" for one in documents)
            (folder / "corpus" / language / f"{part}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name, text in (("base", BASE), ("child", CHILD), ("toy", STUDY)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.long
def test_one_command_builds_trains_and_tells_and_does_nothing_twice(study, texts, tmp_path, capsys):
    words = [str(texts / "toy.yaml"), "--data", str(texts), "--output", str(tmp_path / "out")]
    assert study.main(words) == 0
    table = (tmp_path / "out" / "toy.md").read_text()
    assert "| 25%, equal new tokens | 192 | 256 |" in table
    told = capsys.readouterr().out
    assert told.count("1 runs, 0 of them are finished") == 2 and table in told

    assert study.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("1 runs, 1 of them are finished") == 2 and table in again

    # Other settings are another run, which does not take the place of this one.
    assert study.main([*words, "arms={plain: [stages.0.schedule.peak=2e-3]}"]) == 2
    assert "plain-replay-25-percent-adds_to_new ended with 2;" in capsys.readouterr().err


def test_a_study_that_names_what_is_not_known_is_refused(study, tmp_path, capsys):
    with pytest.raises(Fault, match="replays"):
        read(study, "replay", "replays=[1%]")
    assert study.main([str(FOLDER / "replay.yaml"), "--data", str(tmp_path), "replays=[1%]"]) == 2
    assert "study.py: " in capsys.readouterr().err
