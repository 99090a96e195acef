"""A run that was killed and taken up again tells where its time went, which an independent clock confirms."""

from __future__ import annotations

import time

import pytest
from cpt_harness import runs

from cpt.checkpoint import find_checkpoint
from cpt.observe.attempts import read_attempts
from cpt.report import read_run


def test_a_run_that_was_killed_and_taken_up_twice_accounts_for_all_its_time(data, tmp_path):
    run = tmp_path / "run"
    plain = runs.settings(data, run, [runs.stage(data, "prose", 100_000)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    began = time.time()
    process = runs.start(config, folder=tmp_path)
    runs.wait_for_step(run, 18, process)
    process.kill()
    runs.end(process)
    killed = time.time()
    made = runs.num_lines(run / "metrics.jsonl")
    time.sleep(2)
    for _ in range(2):
        saved = find_checkpoint(run / "checkpoints").state["progress"]["step"]
        ((status, _),) = runs.cpt("train", config, before=runs.ask_to_stop_at(saved + 8))
        assert status == 143
    ended = time.time()

    account = read_run(run).goodput
    events = read_attempts(run)
    assert (account.attempts, account.lost_steps) == (3, made - find_first_resume(events))
    assert sum(account.seconds.values()) == pytest.approx(account.wall_seconds)
    starts = [event["time"] - event["prepared_seconds"] for event in events if event["event"] == "started"]
    assert account.wall_seconds == pytest.approx(events[-1]["time"] - starts[0])
    assert account.wall_seconds < ended - began + 0.1
    # The killed attempt ended with its last step, as far as anyone knows: not before the clock here said so.
    assert account.seconds["down"] >= starts[1] - killed
    assert account.seconds["lost"] > 0 and account.seconds["save"] > 0 and account.seconds["evaluation"] > 0
    assert account.seconds["queue"] == 0 and -0.05 < account.seconds["other"] < account.wall_seconds
    steps = runs.lines(run / "metrics.jsonl")
    assert account.seconds["training"] == pytest.approx(sum(step["step_seconds"] for step in steps))


def find_first_resume(events: list[dict]) -> int:
    """The step that the second attempt went on from."""
    return [event["step"] for event in events if event["event"] == "started"][1]
