"""The page stands alone, shows every run, takes no harm from what is in the files, and is never half-written."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cpt.cli import report as report_command
from cpt.config import Fault
from cpt.evaluation import score_matrix
from cpt.report import Parent, RunRecord, StepRecord, hours_text, plots
from cpt.report.goodput import CAUSES, Goodput
from cpt.report.page import page, write_report

HOSTILE = "</pre><script>alert('$x$ & more')</script>"


def record(label: str, rise: float, parent_label: str | None = None, source: str = "prose", num_steps: int = 40):
    steps = tuple(
        StepRecord(step, step * 100, "only", 4 + math.sin(step), 1e-3 / step, {source: 4.0, "code": 3.0 + 1 / step})
        for step in range(1, num_steps + 1)
    )
    scores = [
        {
            "step": step,
            "tokens": step * 100,
            "stage": "only",
            "source": name,
            "loss": loss,
            "stage_end": step == num_steps,
        }
        for step, losses in ((0, (3.0, 5.0)), (num_steps // 2, (3.1, 4.0)), (num_steps, (3.0 + rise, 2.0)))
        for name, loss in zip((source, "code"), losses, strict=True)
    ]
    parent = Parent("base", num_steps, num_steps * 100) if parent_label else None
    return RunRecord(
        Path("runs") / "x", label, parent, steps, score_matrix(scores), f"name: {label}\n",
        parent_label=parent_label, tokens_before=num_steps * 100 if parent_label else 0,
    )  # fmt: skip


FAMILY = (record("base", 0.0), record("plain", 0.8, "base"), record("replay", 0.2, "base"))


class Reader(HTMLParser):
    """Notes tags, attributes and words, and that every element that is opened is closed."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)


def test_the_page_names_every_run_and_shows_all_pictures():
    read = Reader(page(FAMILY))
    assert read.open == []
    assert read.tags.count("svg") == 3 + len(FAMILY)  # held-out loss, training loss, learning rate, one map a run
    assert read.tags.count("details") == len(FAMILY)
    words = "".join(read.words)
    assert "Of prose, replay forgot 0.200 and plain 0.800: 75 % less." in words
    assert "left base at step 40, after 4.00 k tokens; trained on 4.00 k tokens" in words


def with_hours(run: RunRecord, share: float) -> RunRecord:
    """So much of a hundred hours was training, the rest was down."""
    seconds = {**dict.fromkeys(CAUSES, 0.0), "training": 36e4 * share, "down": 36e4 * (1 - share)}
    return dataclasses.replace(run, goodput=Goodput(36e4, seconds, attempts=3, lost_steps=41))


def test_the_page_tells_where_the_hours_went_of_the_runs_that_noted_it():
    base, plain, replay = FAMILY
    read = Reader(page((base, with_hours(plain, 0.9), with_hours(replay, 0.5))))
    words = "".join(read.words)
    assert "Goodput, training over wall time: plain 90.0 %, replay 50.0 %." in words
    assert "4d04h" in words and "3d18h  90.0 %" in words and "41" in words
    assert read.tags.count("svg") == 3 + len(FAMILY) + 1
    assert "Where the hours went" not in page(FAMILY)


def test_the_terminal_tells_where_the_hours_went():
    told = hours_text([with_hours(FAMILY[1], 0.9)])
    assert told.splitlines()[1].split() == ["cause", "|", "plain"]
    rows = {line.split()[0]: line.split()[2:] for line in told.splitlines()}
    assert rows["training"] == ["3d18h", "90.0", "%"] and rows["down"] == ["10h00m", "10.0", "%"]
    assert told.splitlines()[-1] == "Goodput, training over wall time: plain 90.0 %."
    assert hours_text(FAMILY) == ""


def test_the_page_asks_for_nothing_outside_itself():
    text = page(FAMILY)
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "image", "object"} & set(read.tags)
    places = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(place.startswith("#") for place in places)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_text_from_the_files_is_only_ever_text():
    run = record(HOSTILE, 0.5, source=HOSTILE)
    read = Reader(page([run]))
    assert read.open == []
    assert "script" not in read.tags
    assert HOSTILE in "".join(read.words)


def test_no_two_elements_have_one_id_and_every_reference_has_its_element():
    text = page(FAMILY)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in re.findall(r"(?<=url\()#[^)]*", text)} <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_the_same_runs_give_the_same_page():
    assert page(FAMILY) == page(FAMILY)


def test_pictures_take_their_ink_from_the_page():
    picture = plots.held_out_loss(FAMILY)
    ElementTree.fromstring(picture)
    assert "currentColor" in picture
    assert plots.INK not in picture


def test_a_run_keeps_its_colour_from_picture_to_picture():
    for picture in (plots.held_out_loss(FAMILY), plots.training_loss(FAMILY), plots.learning_rate(FAMILY)):
        assert all(colour in picture for colour in plots.RUN_COLOURS[:3])
        assert plots.RUN_COLOURS[3] not in picture


def test_children_begin_where_their_parent_was_left():
    base, child = (plots.curve(run, [(run.scores.rows[0].tokens, 3.0)]) for run in FAMILY[:2])
    assert (base.tokens.tolist(), child.tokens.tolist()) == ([0.0], [4000.0])


def test_a_long_run_is_thinned_to_means_that_keep_its_level():
    run = record("long", 0.0, num_steps=40)
    tokens, values = plots.thinned(plots.curve(run, [(step, step % 2) for step in range(3000)]))
    assert len(values) == 600
    assert values.mean() == pytest.approx(0.5)
    assert tokens[0] == 2.0


def test_values_that_are_not_finite_are_not_drawn():
    curve = plots.curve(FAMILY[0], [(0, float("nan")), (100, 3.0), (200, None), (300, float("inf"))])
    assert curve.values.tolist() == [3.0]


def test_the_map_is_darkest_at_the_highest_loss_of_the_children():
    base, plain, _ = FAMILY
    assert plots.shade(base.scores.rows[0], "prose", FAMILY) == 0.0
    assert plots.shade(plain.scores.rows[-1], "prose", FAMILY) == 1.0
    assert plots.shade(plain.scores.rows[1], "prose", FAMILY) == pytest.approx(0.1 / 0.8)


def test_a_map_of_many_evaluations_keeps_the_milestones():
    lines = [{"step": step, "source": "prose", "loss": 3.0, "stage_end": step == 70} for step in range(100)]
    run = RunRecord(Path("x"), "x", None, (), score_matrix(lines), "")
    steps = [row.step for row in plots.thinned_rows(run)]
    assert len(steps) == plots.MOST_HEAT_ROWS
    assert {0, 70, 99} <= set(steps)


def test_runs_without_steps_and_scores_have_a_page_too():
    text = page([RunRecord(Path("x"), "new", None, (), score_matrix([]), "")])
    assert "<svg" not in text
    assert "new has not been evaluated before and after training yet." in text
    assert "run.yaml is not there" in text


def test_a_report_is_written_over_an_older_one_and_nothing_else_is_left(tmp_path):
    write_report(FAMILY[:1], tmp_path / "new folder" / "report.html")
    write_report(FAMILY[1:2], tmp_path / "new folder" / "report.html")
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["report.html"]
    assert "<h1>Report on plain</h1>" in (tmp_path / "new folder" / "report.html").read_text(encoding="utf-8")


def test_a_file_that_is_no_page_is_not_written_over(tmp_path):
    with pytest.raises(Fault, match=r"notes.txt is not the name of a page; give it the ending .html"):
        write_report(FAMILY, tmp_path / "notes.txt")


def test_a_folder_in_place_of_the_page_is_refused(tmp_path):
    (tmp_path / "pages.html").mkdir()
    with pytest.raises(Fault, match=r"pages.html is a folder; name a file in it, such as .*report.html"):
        write_report(FAMILY, tmp_path / "pages.html")


def test_a_page_that_cannot_be_written_is_told_and_leaves_the_old_one(tmp_path, monkeypatch):
    def disk_full(source, target):
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("cpt.report.page.os.replace", disk_full)
    with pytest.raises(Fault, match=r"cannot write the report .*: No space left on device; name a file in a folder"):
        write_report(FAMILY, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    return report_command.run(parser.parse_args(words))


def write_scores(folder: Path, *losses: float) -> str:
    folder.mkdir()
    lines = [f'{{"step": {step}, "source": "prose", "loss": {loss}}}\n' for step, loss in enumerate(losses)]
    (folder / "scores.jsonl").write_text("".join(lines))
    return str(folder)


def test_the_command_prints_the_comparison_and_where_the_page_lies(tmp_path, capsys):
    runs = [write_scores(tmp_path / "plain", 3.0, 3.5), write_scores(tmp_path / "replay", 3.0, 3.25)]
    assert command(*runs, "--output", str(tmp_path / "report.html")) == 0
    told = capsys.readouterr().out
    assert "plain  |  3.000  3.000  3.500      +0.500" in told
    assert told.endswith(f"report with pictures: {tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_command_prints_the_matrix_of_a_single_run_and_needs_no_output(tmp_path, capsys):
    assert command(write_scores(tmp_path / "plain", 3.0, 3.5)) == 0
    told = capsys.readouterr().out
    assert "score matrix of plain" in told
    assert "report with pictures" not in told


def test_the_command_refuses_a_wrong_output_before_it_reads_anything(tmp_path):
    with pytest.raises(Fault, match="is not the name of a page"):
        command(str(tmp_path / "nowhere"), "--output", "page.txt")
