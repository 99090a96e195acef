"""The measures of lineages as the report tells them: tables, the page, JSON; worked out by hand on two runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from cpt.cli import report as report_command
from cpt.config import Fault
from cpt.report import measures_text, read_runs
from cpt.report.page import page


def write(folder: Path, stage: str, rows: list[tuple[int, float, float]], parent: dict | None = None) -> Path:
    """A run of one stage that learns the source of its name; rows are (step, loss of prose, loss of code)."""
    folder.mkdir()
    lines = [
        {"step": step, "tokens": step * 100, "stage": stage, "stage_end": step == rows[-1][0], "source": source,
         "loss": loss}
        for step, *losses in rows for source, loss in zip(("prose", "code"), losses, strict=True)
    ]  # fmt: skip
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"stages": [{"name": stage, "sources": {stage: {"corpus": "x"}}}]}
    (folder / "run.yaml").write_text(json.dumps(settings))
    (folder / "lineage.json").write_text(json.dumps({"run": folder.name, "parent": parent}))
    return folder


@pytest.fixture
def family(tmp_path) -> list[Path]:
    parent = {"run": "../base", "step": 20, "tokens": 2000, "learning_rate": 1e-3}
    return [
        write(tmp_path / "base", "prose", [(0, 8.0, 9.0), (20, 3.0, 7.0)]),
        write(tmp_path / "child", "code", [(0, 3.0, 7.0), (5, 4.0, 5.0), (10, 3.5, 2.0)], parent),
    ]


def command(capsys, *words: object) -> str:
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    assert report_command.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def test_measures_and_what_stages_did_to_other_sources_are_told(family):
    assert measures_text(read_runs(family)).split("\n") == [
        "measures over each run and its parents, nats a token",
        "run   | learned  retained  forgetting     BWT     FWT",
        "base  |   3.000     3.000           -       -       -",
        "child |   2.500     2.750      +0.500  -0.500  +2.000",
        "",
        "what each stage did to other sources, nats a token",
        "run    stage  source | before  after  change    gap  tokens to recover",
        "base   prose  code   |  9.000  7.000  -2.000  0.000                  0",
        "child  code   prose  |  3.000  3.500  +0.500  0.500           not back",
    ]


def test_the_command_tells_them_of_a_child_alone_too(family, capsys):
    assert "child |   2.500     2.750      +0.500  -0.500  +2.000" in command(capsys, family[1])


def test_the_page_has_them_with_what_they_mean(family):
    text = page(read_runs(family))
    assert "<h2>Measures</h2>" in text and "+0.500" in text and "BWT: positive where later stages helped" in text


def test_json_holds_the_matrix_and_the_measures_and_no_number_that_json_does_not_know(family, capsys):
    with (family[1] / "scores.jsonl").open("a") as file:
        file.write('{"step": 10, "tokens": 1000, "stage": "code", "stage_end": true, "source": "odd", "loss": NaN}\n')
    base, child = json.loads(command(capsys, *family, "--json"))["runs"]
    assert child["measures"] == {
        "learned": 2.5, "retained": 2.75, "forgetting": 0.5, "backward_transfer": -0.5, "forward_transfer": 2.0,
    }  # fmt: skip
    assert child["passages"][1:] == [
        {"run": "child", "stage": "code", "source": "prose", "before": 3.0, "after": 3.5, "gap": 0.5,
         "recovery_tokens": None}
    ]  # fmt: skip
    assert [row["tokens"] for row in child["scores"]] == [0, 500, 1000]
    assert child["scores"][-1]["scores"]["odd"]["loss"] is None
    assert (child["parent"]["step"], base["parent"]) == (20, None)


def test_forward_transfer_is_held_against_a_baseline_where_one_is_given(family, tmp_path, capsys):
    baseline = write(tmp_path / "other", "code", [(0, 8.0, 6.5), (9, 8.0, 2.0)])
    told = command(capsys, family[1], "--baseline", baseline)
    assert "child |   2.500     2.750      +0.500  -0.500  -0.500" in told
    empty = write(tmp_path / "empty", "code", [(9, 8.0, 2.0)])
    with pytest.raises(Fault, match=r"--baseline .*/empty: this run was not evaluated before its first step"):
        command(capsys, family[1], "--baseline", empty)


def test_a_parent_whose_scores_are_damaged_is_left_out_and_noted(family):
    (family[0] / "scores.jsonl").write_text('{"step": 4}\n')
    (run,) = read_runs(family[1:])
    assert run.history is None and measures_text([run]) == ""
    assert run.notes[0].startswith(f"the parents of {family[1]} are left out: ")
