"""What a run and its child leave in their folders, and that the numbers in there agree with one another."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from cpt_harness import runs

from cpt.checkpoint import RunFolder
from cpt.config import as_mapping, read_settings
from cpt.data.corpus import Corpus
from cpt.lineage import tree
from cpt.lineage.ledger import Ledger
from cpt.observe.attempts import read_attempts
from cpt.run import Run, read_run

STEP_FIELDS = ["step", "tokens", "stage", "loss", "loss_by_source", "learning_rate", "s1", "s2", "grad_norm",
               "step_seconds", "tokens_per_second", "mfu", "skipped"]  # fmt: skip
SCORE_FIELDS = ["step", "tokens", "stage", "stage_end", "source", "loss", "bits_per_byte", "evaluated_tokens",
                "interval", "interval_over", "evaluation_seconds"]  # fmt: skip


def test_a_run_folder_holds_what_the_design_says_and_nothing_else(base, child):
    for run, last in ((base, "step-00000020"), (child, "step-00000016")):
        assert sorted(path.name for path in run.iterdir()) == [
            ".lock", "attempts.jsonl", "checkpoints", "finished.json", "ledger.json", "lineage.json", "logs",
            "metrics.jsonl", "order.jsonl", "run.yaml", "scores.jsonl", "tokenizer",
        ]  # fmt: skip
        assert (run / "checkpoints" / "latest").read_text() == f"{last}\n"
        assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank-00000.log"]
    assert sorted(path.name for path in (base / "checkpoints").iterdir()) == [
        "latest", "step-00000015", "step-00000020",
    ]  # fmt: skip


def test_run_yaml_reads_as_the_same_run_and_says_every_setting(base, child):
    for run in (base, child):
        again = read_run([str(run / "run.yaml")])
        plain = yaml.safe_load((run / "run.yaml").read_text())
        assert as_mapping(again) == plain and read_settings(Run, plain) == again
        assert again.optimizer.beta2 == 0.95 and plain["optimizer"]["beta2"] == 0.95
        assert again.model.width == 24, "a child's model is its parent's"


def test_there_is_one_line_a_step_with_every_field(base, child):
    for run, num_steps in ((base, 20), (child, 16)):
        records = runs.lines(run / "metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, num_steps + 1))
        assert [record["tokens"] for record in records] == [s * runs.TOKENS_A_STEP for s in range(1, num_steps + 1)]
        for record in records:
            assert [key for key in record if not key.startswith(("method/", "save_"))] == STEP_FIELDS
            assert record["tokens_per_second"] > 0 and record["mfu"] > 0 and record["skipped"] == 0
        told = [record["step"] for record in records if "method/reptile/displacement" in record]
        assert told == ([3, 6, 9, 12, 15, 18] if run == base else [])


def test_how_long_a_save_held_up_training_stands_in_the_line_of_the_next_step_or_of_the_end(base):
    records = runs.lines(base / "metrics.jsonl")
    assert [record["step"] for record in records if record.get("save_seconds", 0) > 0] == [6, 11, 16]
    (last,) = [event for event in read_attempts(base) if event["event"] == "saved_last"]
    assert last["step"] == 20 and last["seconds"] > 0


def test_the_learning_rate_is_that_of_the_schedule_before_the_step(base):
    from cpt.progress import Progress
    from cpt.schedules import cosine

    schedule = cosine.Schedule(cosine.Settings(5e-3, 5e-4), 20 * runs.TOKENS_A_STEP, 0.0)
    for record in runs.lines(base / "metrics.jsonl"):
        before = Progress(stage_tokens=record["tokens"] - runs.TOKENS_A_STEP)
        assert record["learning_rate"] == schedule.rate(before)


def test_the_childs_learning_rate_rises_from_where_its_parents_ended(base, child):
    last = runs.lines(base / "metrics.jsonl")[-1]["learning_rate"]
    rates = [record["learning_rate"] for record in runs.lines(child / "metrics.jsonl")]
    assert rates[0] == last and rates.index(max(rates)) == 4 and max(rates) == pytest.approx(5e-3)


def assert_areas_are_those_of_the_rates(run: Path, rate_before: float | None) -> None:
    """S1 and S2 of every step, by the definition in cpt/lineage/areas.py, from the rates that stand beside them."""
    records = runs.lines(run / "metrics.jsonl")
    rates = [record["learning_rate"] for record in records]
    falls = [before - after for before, after in pairwise([rates[0] if rate_before is None else rate_before, *rates])]
    inner = [sum(falls[k] * 0.999 ** (i - k) for k in range(i + 1)) for i in range(len(falls))]
    for number, record in enumerate(records, 1):
        assert record["s1"] == pytest.approx(math.fsum(rates[:number]), rel=1e-12)
        assert record["s2"] == pytest.approx(math.fsum(inner[:number]), rel=1e-9, abs=1e-12)
    assert records[-1]["s2"] != 0


def test_s1_and_s2_are_sums_over_the_learning_rates_of_the_run(base, child):
    assert_areas_are_those_of_the_rates(base, None)
    assert_areas_are_those_of_the_rates(child, runs.lines(base / "metrics.jsonl")[-1]["learning_rate"])


def test_s1_and_s2_go_on_over_a_stop(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "code", 6)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    runs.cpt("train", config, before=runs.ask_to_stop_at(3))
    assert 1 < len(runs.lines(tmp_path / "run" / "metrics.jsonl")) < 6
    runs.trained(config)
    assert_areas_are_those_of_the_rates(tmp_path / "run", None)


def test_a_child_begins_with_an_anchor_of_its_own(base, data, tmp_path):
    """The parent ended two updates into a window of three."""
    plain = runs.settings(
        data, tmp_path / "run", [runs.stage(data, "code", 4)],
        parent={"run": str(base)}, methods=[{"name": "reptile", "every": 3}],
    )  # fmt: skip
    runs.trained(runs.write_settings(tmp_path / "run.yaml", plain))
    told = ["method/reptile/displacement" in record for record in runs.lines(tmp_path / "run" / "metrics.jsonl")]
    assert told == [False, False, True, False]


def test_it_learns_and_the_losses_by_source_make_up_the_loss(base, child):
    records = runs.lines(base / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    for record in runs.lines(child / "metrics.jsonl"):
        assert sorted(record["loss_by_source"]) == ["code", "replay/prose"]
        code, prose = record["loss_by_source"]["code"], record["loss_by_source"]["replay/prose"]
        # Of 72 and 24 targets a few do not count, because a document begins with them: at most one in every 20.
        assert abs(code - prose) < 1e-3 or 0.7 < (record["loss"] - prose) / (code - prose) < 0.8


def test_scores_stand_before_the_first_step_along_the_way_and_at_the_end(base, child):
    for run, steps, name in ((base, [0, 7, 14, 20], "prose"), (child, [0, 7, 14, 16], "code")):
        records = runs.lines(run / "scores.jsonl")
        assert [list(record) for record in records] == [SCORE_FIELDS] * len(records)
        assert [(r["step"], r["source"]) for r in records] == [(s, n) for s in steps for n in ("prose", "code")]
        assert [r["stage"] for r in records[::2]] == ["start", name, name, name]
        assert [r["stage_end"] for r in records[::2]] == [False, False, False, True]
        assert all(r["tokens"] == r["step"] * runs.TOKENS_A_STEP for r in records)


def test_a_childs_scores_before_its_first_step_are_its_parents_last(base, child):
    last, first = runs.lines(base / "scores.jsonl")[-2:], runs.lines(child / "scores.jsonl")[:2]
    for above, below in zip(last, first, strict=True):
        assert (above["source"], above["evaluated_tokens"]) == (below["source"], below["evaluated_tokens"])
        assert below["loss"] == pytest.approx(above["loss"], abs=1e-6)
        assert below["bits_per_byte"] == pytest.approx(above["bits_per_byte"], abs=1e-6)


def test_the_child_learned_code(child):
    records = [r for r in runs.lines(child / "scores.jsonl") if r["source"] == "code"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.2


def test_the_ledger_says_what_was_consumed_and_the_childs_goes_on_from_its_parents(base, child, data):
    above, below = (Ledger.from_json(json.loads((run / "ledger.json").read_text())) for run in (base, child))
    assert [(e.source, e.num_consumed) for e in above.entries] == [("prose", 20 * runs.WINDOWS)]
    assert below.entries[0] == above.as_inherited().entries[0], "replay consumes nothing"
    assert [(e.source, e.num_consumed) for e in below.entries[1:]] == [("code", 12 * runs.WINDOWS)]
    assert above.entries[0].fingerprint == Corpus.open(data / "prose").fingerprint
    assert RunFolder(child).latest().state["ledger"] == below.as_json()


def test_the_lineage_names_the_parent_its_step_and_its_last_rate(base, child):
    assert tree.read_lineage(base).parent is None
    parent = tree.read_lineage(child).parent
    assert (parent.run, parent.step, parent.tokens) == (base.resolve(), 20, 20 * runs.TOKENS_A_STEP)
    assert parent.learning_rate == runs.lines(base / "metrics.jsonl")[-1]["learning_rate"]


def test_the_order_chain_has_a_link_a_step(child):
    records = runs.lines(child / "order.jsonl")
    assert [(r["step"], r["windows"]) for r in records] == [(s, s * runs.WINDOWS) for s in range(1, 17)]
    assert len({r["chain"] for r in records}) == 16
    assert RunFolder(child).latest().state["chain"] == records[-1]["chain"]


def test_the_tokenizer_is_that_of_the_corpora(base, data):
    assert (base / "tokenizer" / "tokenizer.json").read_bytes() == (data / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_log_has_a_line_a_step_that_can_be_searched(base):
    lines = [line for line in (base / "logs" / "rank-00000.log").read_text().splitlines() if " step=" in line]
    assert len(lines) == 20
    for field in ("tokens=1920/1920", "stage=prose", "loss=", "prose=", "lr=", "norm=", "tok/s=", "mfu=", "left="):
        assert field in lines[-1], field
