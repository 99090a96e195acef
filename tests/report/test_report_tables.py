"""The tables and sentences of a report, compared with what they should say, character by character."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.evaluation import score_matrix
from cpt.report import Parent, RunRecord, StepRecord, comparison_text, findings, matrix_text, runs_text
from cpt.report.tables import tokens_cell


def record(
    label: str, scores: dict[str, list[float]], parent: Parent | None = None, steps: tuple[StepRecord, ...] = ()
):
    """A run with an evaluation every 100 steps; the last ends the stage `code`."""
    lines = [
        {"step": 100 * row, "tokens": 100000 * row, "stage": "code", "source": source, "loss": loss,
         "bits_per_byte": loss / 2, "stage_end": row + 1 == len(losses)}
        for source, losses in scores.items()
        for row, loss in enumerate(losses)
    ]  # fmt: skip
    lines.sort(key=lambda line: line["step"])
    return RunRecord(Path(label), label, parent, steps, score_matrix(lines), settings="")


BASE = Parent("runs/base", step=244, tokens=999424)
PLAIN = record("plain", {"prose": [3.1, 3.5, 3.85], "code": [4.2, 3.0, 2.6]}, BASE)
REPLAY = record("replay", {"prose": [3.1, 3.0, 3.25], "code": [4.2, 3.1, 2.63]}, BASE)


def test_runs_are_compared_source_by_source_side_by_side():
    assert comparison_text([PLAIN, REPLAY], width=100).split("\n") == [
        "held-out loss, nats a token",
        "       | prose                                       | code",
        "run    | before   best  after  forgetting  bits/byte | before   best  after  forgetting  bits/byte",
        "plain  |  3.100  3.100  3.850      +0.750      1.925 |  4.200  2.600  2.600      +0.000      1.300",
        "replay |  3.100  3.000  3.250      +0.250      1.625 |  4.200  2.630  2.630      +0.000      1.315",
    ]


def test_columns_go_before_the_sources_are_taken_apart():
    assert comparison_text([PLAIN, REPLAY], width=90).split("\n")[2] == (
        "run    | before  after  forgetting  bits/byte | before  after  forgetting  bits/byte"
    )
    assert comparison_text([PLAIN, REPLAY], width=65).split("\n")[2] == (
        "run    | before  after  forgetting | before  after  forgetting"
    )


def test_sources_that_do_not_fit_side_by_side_have_a_table_each():
    assert comparison_text([PLAIN], width=60).split("\n") == [
        "held-out loss of prose, nats a token",
        "run   | before   best  after  forgetting  bits/byte",
        "plain |  3.100  3.100  3.850      +0.750      1.925",
        "",
        "held-out loss of code, nats a token",
        "run   | before   best  after  forgetting  bits/byte",
        "plain |  4.200  2.600  2.600      +0.000      1.300",
    ]


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 9])
def test_every_comparison_keeps_to_the_width(num_sources):
    runs = [record(f"run {number}", {f"source {s}": [3.0, 10.5] for s in range(num_sources)}) for number in range(3)]
    assert max(map(len, comparison_text(runs, width=100).split("\n"))) <= 100


def test_a_run_without_a_source_has_empty_cells():
    text = comparison_text([PLAIN, record("other", {"prose": [3.0, 2.9]})], width=100)
    assert text.split("\n")[-1] == (
        "other |  3.000  2.900  2.900      +0.000      1.450 |      -      -      -           -          -"
    )


def test_a_long_name_loses_its_middle():
    text = comparison_text([record("a" * 40 + "the end", {"prose": [3.0]})], width=100)
    assert "a" * 13 + "…" + "aaaaaaathe end" + " | " in text


def test_the_matrix_has_the_milestones_and_below_them_forgetting_and_rise():
    assert matrix_text(REPLAY).split("\n") == [
        "score matrix of replay: held-out loss, nats a token",
        "stage                 | step  tokens |  prose    code",
        "before the first step |    0       0 |  3.100   4.200",
        "code, end             |  200   200 k |  3.250   2.630",
        "forgetting            |              | +0.250  +0.000",
        "rise                  |              | +0.150  -1.570",
    ]


def test_the_matrix_shows_the_interval_around_a_score_where_it_is_known():
    known = {"step": 0, "stage": "start", "source": "prose", "loss": 3.1, "interval": 0.0214}
    lines = [known, {**known, "source": "code", "interval": None}]
    text = matrix_text(RunRecord(Path("base"), "base", None, (), score_matrix(lines), settings=""))
    assert text.split("\n")[2].split() == [
        "before",
        "the",
        "first",
        "step",
        "|",
        "0",
        "0",
        "|",
        "3.100",
        "±0.021",
        "3.100",
    ]


def test_a_matrix_of_many_sources_is_cut_into_pieces_that_fit():
    run = record("wide", {f"source number {number}": [3.0, 2.0] for number in range(7)})
    text = matrix_text(run, width=80)
    assert max(map(len, text.split("\n"))) <= 80
    assert all(text.count(f"source number {number}") == 1 for number in range(7))
    assert text.count("before the first step") == 4  # two, two, two and one


def test_nothing_evaluated_is_said_so():
    empty = record("empty", {})
    assert comparison_text([empty]) == "no run has been evaluated yet"
    assert matrix_text(empty) == "empty has not been evaluated yet"
    assert findings([empty]) == ["empty has not been evaluated before and after training yet."]


def test_runs_are_listed_with_how_far_and_how_fast_they_went():
    speeds = (10.0, 30.0, 20000.0)
    steps = tuple(
        StepRecord(step, step * 1000, "code", 3.5 - step, 1e-3, tokens_per_second=speed, skipped=int(step == 2))
        for step, speed in enumerate(speeds, start=1)
    )
    assert runs_text([record("plain", {}, BASE, steps)]).split("\n") == [
        "runs",
        "run    parent                | steps  tokens  training loss  tokens/s  skipped steps",
        "plain  runs/base at step 244 |     3  3.00 k          0.500        30              1",
    ]


def test_findings_say_what_was_learned_lost_and_kept():
    mixed = record("mixed", {"prose": [3.1, 3.105], "code": [4.2, 2.0, 2.25]})
    of_code = "learned code (4.200 to 2.250); lost 0.250 nats of code (2.000 at its best, 2.250 now)"
    assert findings([PLAIN, mixed]) == [
        "plain learned code (4.200 to 2.600); lost 0.750 nats of prose (3.100 at its best, 3.850 now).",
        f"mixed {of_code}; kept prose (3.105).",
    ]


def test_siblings_are_compared_where_they_forgot_unequally():
    assert findings([PLAIN, REPLAY])[2:] == ["Of prose, replay forgot 0.250 and plain 0.750: 67 % less."]


def test_runs_of_other_parents_are_not_compared():
    stranger = record("stranger", {"prose": [3.1, 3.1]}, Parent("runs/other", 244, 999424))
    assert len(findings([PLAIN, stranger])) == 2


def test_a_loss_that_is_not_a_number_is_told_as_lost():
    assert findings([record("broken", {"prose": [3.0, float("nan")]})]) == ["broken lost prose (loss nan)."]


@pytest.mark.parametrize(
    ("tokens", "cell"),
    [(0, "0"), (812, "812"), (999, "999"), (999.6, "1.00 k"), (4096, "4.10 k"), (99960, "100 k"), (999424, "999 k"),
     (999999, "1.00 M"), (12.34e9, "12.3 B"), (15e12, "15.0 T"), (2e15, "2000 T")],
)  # fmt: skip
def test_tokens_have_three_figures_and_a_unit(tokens, cell):
    assert tokens_cell(tokens) == cell
