"""The measures of a lineage, worked out by hand on small tables: means over sources, recovery, the stability gap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.config import Fault
from cpt.evaluation import score_matrix
from cpt.evaluation.history import Part, joined, read_history
from cpt.evaluation.measures import gap_depth, lines_about, measures, passages, recovery_tokens


def lines(*rows: tuple[int, str, dict[str, float]], end: bool = True) -> list[dict]:
    """Lines of scores.jsonl: (step, stage, losses by source); a step is 10 tokens. Each last row of a stage ends it."""
    ends = {row[1]: row[0] for row in rows} if end else {}
    return [
        {"step": step, "tokens": 10 * step, "stage": stage, "stage_end": ends.get(stage) == step and step > 0,
         "source": source, "loss": loss}
        for step, stage, losses in rows for source, loss in losses.items()
    ]  # fmt: skip


BASE = lines((0, "start", {"en": 8.0, "fr": 9.0, "de": 10.0}), (100, "en", {"en": 3.0, "fr": 7.0, "de": 8.0}))
CHILD = lines(
    (0, "start", {"en": 3.0, "fr": 7.0, "de": 8.0}),
    (10, "fr", {"en": 3.75, "fr": 5.0, "de": 8.0}),
    (20, "fr", {"en": 3.5, "fr": 4.0, "de": 7.0}),
    (30, "de", {"en": 4.0, "fr": 4.5, "de": 6.0}),
    (40, "de", {"en": 3.25, "fr": 4.75, "de": 2.0}),
)
SOURCES = {"fr": ("fr",), "de": ("de",)}


def three_stages():
    base = Part("base", score_matrix(BASE), {"en": ("en",)}, last_step=100, tokens=1000)
    return joined([base, Part("child", score_matrix(CHILD), SOURCES)])


def test_a_childs_row_0_is_the_end_of_its_parents_last_stage_and_tokens_go_on():
    history = three_stages()
    assert [(s.run, s.name, s.tokens_before, [row.tokens for row in s.rows]) for s in history.stages] == [
        ("base", "en", 0, [1000]), ("child", "fr", 1000, [1100, 1200]), ("child", "de", 1200, [1300, 1400]),
    ]  # fmt: skip
    assert history.column("en") == (8.0, 3.0, 3.75, 3.5, 4.0, 3.25)


def test_the_means_are_those_worked_out_by_hand():
    found = measures(three_stages())
    # By stage, en fr de: row 0 8 9 10; after en 3 7 8; after fr 3.5 4 7; after de 3.25 4.75 2.
    assert found.learned == (3.0 + 4.0 + 2.0) / 3
    assert found.retained == (3.25 + 4.75 + 2.0) / 3
    assert found.forgetting == ((3.25 - 3.0) + (4.75 - 4.0)) / 2
    assert found.backward_transfer == ((3.0 - 3.25) + (4.0 - 4.75)) / 2 == -0.5
    assert found.forward_transfer == ((9.0 - 7.0) + (10.0 - 7.0)) / 2 == 2.5


def test_forward_transfer_can_be_held_against_a_baseline():
    assert measures(three_stages(), {"fr": 7.5, "de": 6.0}).forward_transfer == ((7.5 - 7.0) + (6.0 - 7.0)) / 2


def test_forgetting_counts_from_the_best_on_the_way_and_backward_transfer_from_the_end_of_the_own_stage():
    scores = lines(
        (0, "start", {"a": 5.0, "b": 5.0}), (1, "a", {"a": 2.0, "b": 5.0}), (2, "a", {"a": 2.5, "b": 5.0}),
        (3, "b", {"a": 2.25, "b": 3.0}),
    )  # fmt: skip
    found = measures(joined([Part("run", score_matrix(scores), {"a": ("a",), "b": ("b",)})]))
    assert found.forgetting == 2.25 - 2.0
    assert found.backward_transfer == 2.5 - 2.25, "positive: the stage b made a better"
    assert found.forward_transfer == 0.0


def test_a_first_stage_alone_has_learned_and_retained_and_nothing_to_forget():
    found = measures(joined([Part("base", score_matrix(BASE), {"en": ("en",)})]))
    assert (found.learned, found.retained) == (3.0, 3.0)
    assert (found.forgetting, found.backward_transfer, found.forward_transfer) == (None, None, None)


def test_a_run_without_scores_or_stages_has_no_measures():
    assert set(vars(measures(joined([Part("new", score_matrix([]), {})]))).values()) == {None}


def test_held_out_text_that_no_stage_learns_is_in_no_mean_but_has_passages():
    scores = lines((0, "start", {"a": 5.0, "probe": 4.0}), (1, "a", {"a": 2.0, "probe": 4.5}))
    history = joined([Part("run", score_matrix(scores), {"a": ("a",)})])
    assert measures(history).learned == 2.0
    assert [(p.source, p.before, p.after) for p in passages(history)] == [("probe", 4.0, 4.5)]


def test_what_an_ancestor_did_after_its_child_had_left_is_no_part_of_the_history():
    base = lines((0, "start", {"a": 5.0}), (10, "a", {"a": 3.0}), (20, "a", {"a": 1.0}))
    child = lines((0, "start", {"a": 2.5}), (5, "b", {"a": 2.75}))
    history = joined([Part("base", score_matrix(base), {"a": ("a",)}, last_step=15, tokens=150),
                      Part("child", score_matrix(child), {})])  # fmt: skip
    assert history.column("a") == (5.0, 3.0, 2.5, 2.75)
    assert [row.tokens for row in history.rows] == [0, 100, 150, 200]
    assert measures(history).forgetting == 0.25


def test_a_child_that_calls_its_stage_and_itself_as_its_parent_did_has_a_stage_of_its_own():
    base = lines((0, "start", {"a": 5.0}), (10, "go", {"a": 3.0}))
    child = lines((0, "start", {"a": 3.0}), (5, "go", {"a": 2.75}))
    history = joined([Part("run", score_matrix(base), {}, last_step=10, tokens=100),
                      Part("run", score_matrix(child), {})])  # fmt: skip
    assert [(stage.tokens_before, len(stage.rows)) for stage in history.stages] == [(0, 1), (100, 1)]


def test_passages_tell_what_each_stage_did_to_what_it_does_not_learn():
    told = {(p.stage, p.source): (p.before, p.after, p.gap, p.recovery_tokens) for p in passages(three_stages())}
    assert told == {
        ("en", "fr"): (9.0, 7.0, 0.0, 0),
        ("en", "de"): (10.0, 8.0, 0.0, 0),
        ("fr", "en"): (3.0, 3.5, 0.25, None),  # up to 3.75, of which 0.25 went away again
        ("fr", "de"): (8.0, 7.0, 0.0, 0),
        ("de", "en"): (3.5, 3.25, 0.5, 200),  # up to 4.0, then below what it was
        ("de", "fr"): (4.0, 4.75, 0.0, None),  # up and up: nothing of it went away
    }


def test_the_log_tells_the_measures_and_what_the_newest_stage_did():
    assert lines_about(three_stages()) == [
        "learned 3.0000, retained 3.3333, forgetting +0.5000, BWT -0.5000, FWT +2.5000",
        "en 3.5000 to 3.2500 (-0.2500), gap 0.5000, back after 200 tokens",
        "fr 4.0000 to 4.7500 (+0.7500), gap 0.0000, not back",
    ]


def test_what_is_not_known_is_told_as_a_dash():
    told = lines_about(joined([Part("base", score_matrix(BASE), {"en": ("en",)})]))
    assert told[0] == "learned 3.0000, retained 3.0000, forgetting -, BWT -, FWT -"
    assert lines_about(joined([Part("new", score_matrix([]), {})])) == []


@pytest.mark.parametrize(
    ("losses", "tokens"),
    [
        ([3.0, 2.9], 0),
        ([3.005, 3.01], 0),
        ([3.5, 3.2, 3.01, 2.9], 30),
        ([3.5, 3.0, 3.4, 3.0], 40),  # back, away again, and back to stay
        ([3.5, 3.0, 3.4], None),
        ([float("nan"), 3.0], 20),
        ([float("nan")], None),
        ([], 0),
    ],
)
def test_recovery_is_from_where_it_stays_within_the_tolerance(losses, tokens):
    assert recovery_tokens(3.0, [(10 * n, loss) for n, loss in enumerate(losses, start=1)], 0.0101) == tokens


@pytest.mark.parametrize(
    ("losses", "depth"),
    [
        ([3.0, 2.0], 0.0),
        ([3.5, 4.0], 0.0),  # a rise that stays
        ([4.0, 3.0], 1.0),
        ([4.0, 2.0], 1.0),  # no deeper than down to where it was
        ([4.0, 3.5, 3.75], 0.5),
        ([3.5, 3.0, 4.5, 4.0], 0.5),
        ([], 0.0),
    ],
)
def test_the_gap_is_the_largest_rise_that_went_away_again(losses, depth):
    assert gap_depth(3.0, losses) == depth


# ---- from folders


def write(folder: Path, scores: list[dict], stages: dict[str, tuple[str, ...]], parent: dict | None = None) -> Path:
    folder.mkdir()
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    plain = [{"name": name, "sources": dict.fromkeys(sources, {})} for name, sources in stages.items()]
    (folder / "run.yaml").write_text(json.dumps({"stages": plain}))
    (folder / "lineage.json").write_text(json.dumps({"run": folder.name, "parent": parent}))
    return folder


def test_a_history_is_read_from_the_folders_of_a_run_and_its_parents(tmp_path):
    write(tmp_path / "base", BASE, {"en": ("en",)})
    parent = {"run": "../base", "step": 100, "tokens": 1000, "learning_rate": 0.1}
    assert read_history(write(tmp_path / "child", CHILD, SOURCES, parent)) == three_stages()


def test_where_the_parents_folder_is_gone_the_history_begins_with_the_child(tmp_path):
    parent = {"run": "../base", "step": 100, "tokens": 1000, "learning_rate": 0.1}
    history = read_history(write(tmp_path / "child", CHILD, SOURCES, parent))
    assert history.row_0.scores["en"].loss == 3.0
    assert [stage.name for stage in history.stages] == ["fr", "de"]


def test_a_folder_of_scores_alone_has_a_history_without_what_was_learned(tmp_path):
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CHILD))
    history = read_history(tmp_path)
    assert [stage.sources for stage in history.stages] == [(), ()]


def test_damaged_scores_are_told_with_their_file(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"step": 4}\n')
    with pytest.raises(Fault, match=r"scores.jsonl: score line 1 has no source and no loss"):
        read_history(tmp_path)
    (tmp_path / "scores.jsonl").write_text("step 4\n")
    with pytest.raises(Fault, match=r"scores.jsonl is damaged .*; mend it or take the line out"):
        read_history(tmp_path)
