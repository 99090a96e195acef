"""What runs read: a batch size that changes, replay of every kind, held-out parts, document borders, any prefetch."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.lineage import chain
from cpt.observe.attempts import read_attempts


def config_of(data: Path, folder: Path, stages: list[dict], **more) -> Path:
    return runs.write_settings(folder / "run.yaml", runs.settings(data, folder / "run", stages, **more))


def chain_over(run: Path) -> dict[int, str]:
    """The order chain by windows trained on."""
    return {record["windows"]: record["chain"] for record in runs.lines(run / "order.jsonl")}


def test_a_batch_size_that_changes_in_mid_run_keeps_the_order_and_the_ledger_exact(data, tmp_path):
    replay = {"share": 0.25, "scope": "all_seen"}
    config = config_of(data, tmp_path, [runs.stage(data, "prose", 12), runs.stage(data, "code", 12, replay=replay)])
    unbroken = runs.trained(config) and tmp_path / "run"
    changed = tmp_path / "changed"
    runs.cpt("train", config, f"output={changed}", before=runs.ask_to_stop_at(4))
    told = runs.trained(config, f"output={changed}", "batch.windows=12", ranks=1)
    assert "batch.windows is 12 from here on, it was 8: the order within the stage stays the same" in told
    records = runs.lines(changed / "metrics.jsonl")
    per_step = [records[0]["tokens"]] + [b["tokens"] - a["tokens"] for a, b in zip(records, records[1:], strict=False)]
    # 5 steps of 8 windows, then 12 a step: each stage ends with the step that spends its 96 windows.
    assert per_step == [8 * runs.LENGTH] * 5 + [12 * runs.LENGTH] * (5 + 8)
    first, second = (json.loads((run / "ledger.json").read_text())["sources"] for run in (unbroken, changed))
    consumed = [[source["windows_consumed"] for source in sources] for sources in (first, second)]
    assert consumed == [[96, 72], [100, 72]]
    # While both are in the first stage, the chains agree wherever the same number of windows was trained on.
    one, other = chain_over(unbroken), chain_over(changed)
    common = sorted(number for number in one.keys() & other.keys() if number <= 96)
    assert common == [8, 16, 24, 32, 40, 64, 88]
    assert all(one[number] == other[number] for number in common)
    assert one[8] != chain.START


@pytest.mark.parametrize(
    "replay",
    [
        {"share": 0.25, "scope": "all_seen", "capacity": 20},
        {"share": 0.25, "order": "original", "accounting": "adds_to_new"},
        {"share": 0.1, "ramp": {"start": 0.5, "tokens": 6 * runs.TOKENS_A_STEP}},
    ],
    ids=str,
)
def test_stopped_with_any_kind_of_replay_on_another_number_of_ranks_the_windows_are_the_same(data, tmp_path, replay):
    stages = [runs.stage(data, "prose", 3), runs.stage(data, "code", 9, replay=replay)]
    config = config_of(data, tmp_path, stages, loader={"prefetch": 0})
    runs.trained(config)
    other = tmp_path / "other"
    words = ("train", config, f"output={other}", "loader={prefetch: 3, workers: 2}", "batch.micro_batch=2")
    runs.cpt(*words, ranks=2, before=runs.ask_to_stop_at(6))
    runs.trained(*words[1:], "zero=3")
    assert runs.lines(other / "order.jsonl") == runs.lines(tmp_path / "run" / "order.jsonl")
    assert (other / "ledger.json").read_text() == (tmp_path / "run" / "ledger.json").read_text()


def test_replay_of_declared_data_needs_no_ancestor_and_is_told_by_its_name(data, tmp_path):
    replay = {"share": 0.5, "declared": {"pile": {"corpus": str(data / "prose"), "tokens": 2000}}}
    runs.trained(config_of(data, tmp_path, [runs.stage(data, "code", 4, replay=replay)]))
    records = runs.lines(tmp_path / "run" / "metrics.jsonl")
    assert set(records[0]["loss_by_source"]) == {"code", "replay/pile"}
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert [source["source"] for source in ledger["sources"]] == ["code"]


def test_a_part_held_out_is_scored_under_the_name_of_its_source(data, tmp_path):
    stage = runs.stage(data, "prose", 4)
    stage["sources"]["prose"]["hold_out"] = "10%"
    config = config_of(data, tmp_path, [stage], evaluation={"windows": 0})
    runs.trained(config)
    scores = runs.lines(tmp_path / "run" / "scores.jsonl")
    assert [(score["source"], score["step"]) for score in scores] == [("prose", 0), ("prose", 4)]
    # A tenth of some 5,000 tokens in windows of 12, but for the first tokens of documents.
    assert 400 < scores[0]["evaluated_tokens"] < 520


def test_a_stage_that_asks_for_more_than_max_epochs_is_refused_before_anything_is_written(data, tmp_path):
    stages = [runs.stage(data, "prose", 3), runs.stage(data, "code", 400)]
    stages[1]["sources"]["code"]["max_epochs"] = 2
    ((status, told),) = runs.cpt("train", config_of(data, tmp_path, stages))
    assert status == 2
    assert "stages.1.sources.code: the stage asks for 3,200 windows and may draw 8" in told
    assert "max_epochs = 2; raise max_epochs" in told
    assert not (tmp_path / "run").exists()


def test_a_child_reads_nothing_again_that_its_parent_read_unless_told(data, base, tmp_path):
    # The parent read 160 of the 416 windows or so of an epoch.
    stages = [runs.stage(data, "prose", 40)]
    config = config_of(data, tmp_path, stages, parent={"run": str(base)})
    ((status, told),) = runs.cpt("train", config)
    assert status == 2
    assert "ancestors have read the rest; set max_epochs = 2 to read it again" in told
    stages[0]["sources"]["prose"]["max_epochs"] = 2
    config = config_of(data, tmp_path, stages, parent={"run": str(base)})
    runs.trained(config)


def test_the_table_of_sources_is_told_at_the_beginning_of_each_stage(data, tmp_path):
    replay = {"share": 0.25}
    stages = [runs.stage(data, "prose", 3), runs.stage(data, "code", 4, replay=replay)]
    told = runs.trained(config_of(data, tmp_path, stages))
    assert "stage prose: source  tokens   share  epochs  before  corpus" in told
    assert "stage code: replay" in told and "tokens of prose" in told


def test_attention_within_documents_is_the_custom_of_llama_and_across_can_be_had(data, tmp_path):
    config = config_of(data, tmp_path, [runs.stage(data, "prose", 3)])
    for kind in ("within_document", "across_documents"):
        runs.trained(config, f"attention={kind}", f"output={tmp_path / kind}")
    runs.trained(config)
    own, within, across = (
        [record["loss"] for record in runs.lines(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "within_document", "across_documents")
    )
    assert own == within
    assert all(abs(a - b) > 1e-6 for a, b in zip(within, across, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_process_in_the_same_folder_is_refused_and_changes_nothing(base, data, tmp_path, ranks):
    config = config_of(data, tmp_path, [runs.stage(data, "prose", 3)])
    (tmp_path / "run").mkdir()
    lock = os.open(tmp_path / "run" / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = runs.cpt("train", config, ranks=ranks)
    finally:
        os.close(lock)
    assert [status for status, _ in ended] == [1] * ranks  # that may pass
    assert (
        f"output = {tmp_path / 'run'}: another process is training there; wait for it, or stop it first" in ended[0][1]
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "attempts.jsonl"]
    assert [event["has_started"] for event in read_attempts(tmp_path / "run")] == [False]
    runs.trained(config, ranks=ranks)
