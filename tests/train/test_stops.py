"""Asked to stop at any moment, by a signal or a file, a run ends with the right status and a whole folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from cpt_harness import faults, runs

from cpt.checkpoint import RunFolder
from cpt.observe.attempts import read_attempts


@pytest.fixture
def config(data, tmp_path) -> Path:
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 4000)])
    return runs.write_settings(tmp_path / "run.yaml", plain)


def assert_whole(run: Path) -> None:
    """What is there can be read, and no line is torn."""
    latest = RunFolder(run).latest()
    assert latest is not None
    latest.close()
    for name in ("metrics.jsonl", "order.jsonl"):
        runs.lines(run / name)


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_called_stop_is_heeded_as_a_sigterm_and_goes(config, tmp_path, number):
    run = tmp_path / "run"
    with faults.started(config, number=number, folder=tmp_path) as ranks:
        ranks.wait_for_step(run, 3)
        (run / "stop").touch()
        assert ranks.wait() == [143] * number
        assert f"{run}/stop is there: this run saves after its next step and ends" in ranks.told(0)
    assert not (run / "stop").exists()
    assert_whole(run)
    ended = faults.last_end(run)
    assert (ended["how"], ended["signal"], ended["by"]) == ("stopped", signal.SIGTERM, "file")
    assert ended["step"] == RunFolder(run).latest().state["progress"]["step"]


def test_a_file_called_stop_of_an_earlier_attempt_stops_nothing(data, tmp_path):
    run = tmp_path / "run"
    plain = runs.settings(data, run, [runs.stage(data, "prose", 4)])
    run.mkdir()
    (run / "stop").touch()
    runs.trained(runs.write_settings(tmp_path / "run.yaml", plain))
    assert (run / "finished.json").exists() and not (run / "stop").exists()


def test_attempts_tell_where_it_started_what_it_ran_on_and_how_it_ended(data, tmp_path):
    run = tmp_path / "run"
    config = runs.write_settings(tmp_path / "run.yaml", runs.settings(data, run, [runs.stage(data, "prose", 6)]))
    runs.cpt("train", config, ranks=2, before=runs.ask_to_stop_at(3))
    runs.trained(config, ranks=1)
    events = [{k: v for k, v in event.items() if k != "time"} for event in read_attempts(run)]
    events = [event for event in events if event["event"] in ("started", "training", "ended")]
    assert [event["event"] for event in events] == ["started", "training", "ended"] * 2
    here = os.uname().nodename
    assert events[0].pop("prepared_seconds") >= 0
    assert events[0] == {"event": "started", "step": 0, "ranks": 2, "nodes": [here], "job": None, "attempt": 1}
    assert events[1] == {"event": "training", "step": 0}
    assert events[2] == {"event": "ended", "how": "stopped", "step": 4, "signal": signal.SIGTERM}
    assert (events[3]["step"], events[3]["ranks"], events[3]["attempt"]) == (4, 1, 2)
    assert events[5] == {"event": "ended", "how": "finished", "step": 6}


# Seconds after a start: before the folder, in the scores before step 1, in steps and in the saves after every other.
MOMENTS = [0.1, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9, 2.2]


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("is_twice", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_at_any_moment_leave_a_run_that_goes_on_to_the_same_end(data, tmp_path, sent, is_twice, number):
    stages = [runs.stage(data, "prose", 200)]
    plain = runs.settings(data, tmp_path / "run", stages, checkpoint={"every_tokens": 2 * runs.TOKENS_A_STEP})
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    run = tmp_path / "run"
    for moment in MOMENTS if number == 1 else MOMENTS[::2]:
        with faults.started(config, number=number, folder=tmp_path) as ranks:
            time.sleep(moment)
            for _ in range(1 + is_twice):
                for rank in range(number):
                    ranks.send(rank, sent)
            statuses = ranks.wait()
            # Ended before it listened, or after it saved; at a second Ctrl-C without saving; or too late to stop it.
            allowed = {0, -sent, 128 + sent} | ({1} if is_twice and sent == signal.SIGINT and number > 1 else set())
            assert set(statuses) <= allowed, [ranks.told(rank) for rank in range(number)]
            assert not [rank for rank in range(number) if "Traceback" in ranks.told(rank)]
        if RunFolder(run).latest() is not None:
            assert_whole(run)
    runs.trained(config, ranks=number)
    steps = [record["step"] for record in runs.lines(run / "metrics.jsonl")]
    assert steps == list(range(1, 201))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_imports_ends_the_process_without_a_word(config, tmp_path, sent):
    process = runs.start(config, folder=tmp_path)
    time.sleep(1.0)
    process.send_signal(sent)
    assert runs.end(process) == -sent
    assert (tmp_path / "out.txt").read_text() == ""
    assert not (tmp_path / "run").exists()
