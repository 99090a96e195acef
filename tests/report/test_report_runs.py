"""Run folders are read as they lie on the disk: finished, just begun, killed in the middle of a line, or damaged."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from cpt.config import Fault
from cpt.report import read_run, read_runs


def write_run(
    folder: Path, parent: dict[str, object] | None = None, name: str | None = None, num_steps: int = 3
) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("model: {name: llama}\n")
    (folder / "lineage.json").write_text(json.dumps({"run": name or folder.name, "parent": parent}))
    steps = [metrics_line(step, loss=4.0 - step / 8) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    scores = [
        {"step": 0, "tokens": 0, "stage": "start", "source": "prose", "loss": 4.0, "bits_per_byte": 1.5},
        {
            "step": num_steps,
            "tokens": num_steps * 100,
            "stage": "only",
            "source": "prose",
            "loss": 3.0,
            "stage_end": True,
        },
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    return folder


def metrics_line(step: int, **values: object) -> dict[str, object]:
    line = {"step": step, "tokens": step * 100, "stage": "only", "loss": 3.5, "loss_by_source": {"prose": 3.5}}
    return {**line, "learning_rate": 1e-3, "tokens_per_second": 50.0, "mfu": None, "skipped": 0, **values}


def append(path: Path, *lines: dict[str, object]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_run_is_read_with_its_steps_scores_parent_and_settings(tmp_path):
    parent = {"run": "../base", "step": 7, "tokens": 700, "learning_rate": 1e-3}
    run = read_run(write_run(tmp_path / "child", parent))
    assert (run.label, run.tokens, run.settings) == ("child", 300, "model: {name: llama}\n")
    assert (run.parent.folder, run.parent.step, run.parent.tokens) == ("../base", 7, 700)
    assert [(step.step, step.loss, step.learning_rate) for step in run.steps] == [
        (1, 3.875, 1e-3), (2, 3.75, 1e-3), (3, 3.625, 1e-3),
    ]  # fmt: skip
    assert run.scores.column("prose") == (4.0, 3.0)
    assert run.notes == ()


def test_a_run_that_has_just_begun_has_no_steps_yet(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    run = read_run(tmp_path)
    assert (run.steps, run.scores.sources, run.tokens, run.parent) == ((), (), 0, None)
    assert run.label == tmp_path.name


def test_a_torn_last_line_is_left_out_and_noted(tmp_path, caplog):
    folder = write_run(tmp_path / "killed")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    with caplog.at_level(logging.WARNING):
        run = read_run(folder)
    assert [step.step for step in run.steps] == [1, 2, 3]
    assert "metrics.jsonl: the last line, 4, is torn and was left out" in run.notes[0]
    assert "the last line, 4, is torn" in caplog.text


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path):
    folder = write_run(tmp_path / "damaged")
    with (folder / "scores.jsonl").open("a") as file:
        file.write('{"step": 3, "so{"step": 4}\n')
    append(folder / "scores.jsonl", {"step": 5})
    with pytest.raises(Fault, match=r"scores.jsonl line 3 is not a JSON object: .*mend this one or take it out"):
        read_run(folder)


def test_steps_that_were_done_again_after_a_stop_count_once(tmp_path):
    folder = write_run(tmp_path / "stopped", num_steps=5)
    append(folder / "metrics.jsonl", metrics_line(3, loss=9.0), metrics_line(4, loss=8.0))
    assert [(step.step, step.loss) for step in read_run(folder).steps] == [(1, 3.875), (2, 3.75), (3, 9.0), (4, 8.0)]


def test_values_that_a_step_does_not_have_are_none(tmp_path):
    folder = write_run(tmp_path / "sparse", num_steps=0)
    append(folder / "metrics.jsonl", {"step": 1, "tokens": 5, "loss": None, "loss_by_source": {"prose": None}})
    (step,) = read_run(folder).steps
    assert (step.loss, step.learning_rate, step.loss_by_source, step.skipped) == (None, None, {}, 0)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(Fault, match=r"nowhere is not a folder; name the folder of a run"):
        read_run(tmp_path / "nowhere")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Fault, match="is not a run folder: it holds no run.yaml, metrics.jsonl or scores.jsonl"):
        read_run(tmp_path)


def test_all_folders_that_cannot_be_read_are_told_at_once(tmp_path):
    with pytest.raises(Fault) as told:
        read_runs([tmp_path / "one", write_run(tmp_path / "good"), tmp_path / "two"])
    assert [re.search(r"(\w+) is not a folder", line)[1] for line in told.value.lines] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "lineage.json is not JSON: "), ("[]", "lineage.json is not a JSON object; restore it from a checkpoint")],
)
def test_a_damaged_lineage_is_refused(tmp_path, text, message):
    folder = write_run(tmp_path / "run")
    (folder / "lineage.json").write_text(text)
    with pytest.raises(Fault, match=message):
        read_run(folder)


def test_a_line_of_metrics_without_its_values_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    append(folder / "metrics.jsonl", {"step": 4})
    with pytest.raises(Fault, match=r"a line of metrics.jsonl or lineage.json lacks a value .*'tokens'"):
        read_run(folder)


def test_a_line_of_scores_without_its_values_is_refused_with_the_file(tmp_path):
    folder = write_run(tmp_path / "run")
    append(folder / "scores.jsonl", {"step": 4})
    with pytest.raises(Fault, match=r"scores.jsonl: score line 3 has no source and no loss"):
        read_run(folder)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / seed / "replay") for seed in ("seed1", "seed2")] + [write_run(tmp_path / "plain")]
    assert [run.label for run in read_runs(folders)] == ["seed1/replay", "seed2/replay", "plain"]


def test_a_run_named_twice_is_read_once(tmp_path):
    folder = write_run(tmp_path / "run")
    assert len(read_runs([folder, tmp_path / "." / "run"])) == 1


@pytest.mark.parametrize("style", ["absolute", "beside", "from here", "moved"])
def test_a_parent_is_found_among_the_runs(tmp_path, monkeypatch, style):
    monkeypatch.chdir(tmp_path)
    named = {"absolute": str(tmp_path / "base"), "beside": "../base", "from here": "base", "moved": "/old/place/base"}
    base = write_run(tmp_path / "base")
    child = write_run(tmp_path / "child", {"run": named[style], "step": 3, "tokens": 300})
    runs = read_runs([child, base])
    assert (runs[0].parent_label, runs[0].tokens_before) == ("base", 300)
    assert (runs[1].parent_label, runs[1].tokens_before) == (None, 0)


def test_a_grandchild_has_the_tokens_of_both_before_it(tmp_path):
    base = write_run(tmp_path / "base")
    child = write_run(tmp_path / "child", {"run": str(base), "step": 2, "tokens": 200})
    grandchild = write_run(tmp_path / "grandchild", {"run": str(child), "step": 1, "tokens": 50})
    assert read_runs([base, child, grandchild])[2].tokens_before == 250


def test_a_parent_that_is_not_in_the_report_leaves_the_run_at_the_start(tmp_path):
    child = write_run(tmp_path / "child", {"run": str(tmp_path / "base"), "step": 2, "tokens": 200})
    (run,) = read_runs([child])
    assert (run.parent_label, run.tokens_before) == (None, 0)


def test_two_runs_that_name_each_other_as_parents_are_still_read(tmp_path):
    one = write_run(tmp_path / "one", {"run": str(tmp_path / "two"), "step": 1, "tokens": 100})
    two = write_run(tmp_path / "two", {"run": str(tmp_path / "one"), "step": 1, "tokens": 100})
    assert [run.parent_label for run in read_runs([one, two])] == ["two", "one"]
