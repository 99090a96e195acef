"""Real runs under the supervisor: killed and started again, asked to stop under deepspeed, left alone by its death."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from cpt_harness import runs

from cpt.observe.attempts import read_attempts
from cpt_launcher.rendezvous import pick_free_port

BIN = Path(sys.executable).parent
DEEPSPEED = [sys.executable, BIN / "deepspeed", "--num_accelerators", 2]


def supervise(config: Path, run: Path, folder: Path, *launcher: object):
    """launcher/supervise.py with a run in one process, or under a launcher, as one process group."""
    words = ["--run", run, "--backoff", "0.1", "--", *(launcher or [sys.executable])]
    return runs.start(
        config, f"output={run}", folder=folder, num_cores=None if launcher else 1,
        launcher=[sys.executable, runs.ROOT / "launcher" / "supervise.py", *words],
    )  # fmt: skip


@pytest.fixture
def config(data, tmp_path) -> Path:
    """A run of sixty steps that saves every five."""
    plain = runs.settings(data, tmp_path / "unbroken", [runs.stage(data, "prose", 60)])
    plain["evaluation"]["every_tokens"] = None
    return runs.write_settings(tmp_path / "run.yaml", plain)


@pytest.fixture
def endless(data, tmp_path) -> Path:
    """A run that is still going when a stop comes."""
    plain = runs.settings(data, tmp_path / "unbroken", [runs.stage(data, "prose", 100_000)])
    plain["evaluation"]["every_tokens"] = plain["checkpoint"]["every_tokens"] = None
    return runs.write_settings(tmp_path / "endless.yaml", plain)


def rank_below(process) -> psutil.Process:
    (found,) = [one for one in psutil.Process(process.pid).children(recursive=True) if "run.py" in str(one.cmdline())]
    return found


def test_a_run_that_is_killed_twice_goes_on_by_itself_and_ends_like_an_undisturbed_one(config, tmp_path):
    run = tmp_path / "run"
    process = supervise(config, run, tmp_path)
    for step in (12, 33):
        runs.wait_for_step(run, step, process)
        rank_below(process).kill()
        runs.wait_for(lambda step=step: runs.num_lines(run / "metrics.jsonl") < step, f"going on after step {step}")
    assert runs.end(process) == 0
    runs.trained(config)
    runs.assert_same_story(runs.story(run), runs.story(tmp_path / "unbroken"))
    told = [event["reason"] for event in read_attempts(run) if event["event"] == "restarting"]
    assert told == ["ended by signal 9 without a word"] * 2


def test_a_signal_under_deepspeed_saves_first_and_leaves_no_process(endless, tmp_path):
    run = tmp_path / "run"
    process = supervise(endless, run, tmp_path, *DEEPSPEED, "--master_port", pick_free_port())
    runs.wait_for_step(run, 10, process)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3  # the runner, its launch, two ranks
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) == 143
    assert not [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    step = runs.lines(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08d}\n"
    assert not (run / "stop").exists()


@pytest.mark.long
def test_a_launcher_that_is_killed_is_followed_by_another_when_its_ranks_have_saved(endless, tmp_path):
    run = tmp_path / "run"
    process = supervise(endless, run, tmp_path, *DEEPSPEED, "--master_port", pick_free_port())
    runs.wait_for_step(run, 10, process)
    (runner,) = psutil.Process(process.pid).children()
    runner.kill()
    runs.wait_for(lambda: len([e for e in read_attempts(run) if e["event"] == "training"]) == 2, "the second start")
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) == 143
    started = [event["step"] for event in read_attempts(run) if event["event"] == "started"]
    assert started[1] >= 10  # from what the ranks of the first one saved


def test_a_run_whose_supervisor_is_killed_saves_and_ends(endless, tmp_path):
    run = tmp_path / "run"
    process = supervise(endless, run, tmp_path)
    runs.wait_for_step(run, 10, process)
    rank = rank_below(process)
    os.kill(process.pid, signal.SIGKILL)
    assert runs.end(process) == -signal.SIGKILL
    psutil.wait_procs([rank], timeout=runs.SECONDS)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert "supervise.py) is gone: this run saves after its next step" in (tmp_path / "out.txt").read_text()
    assert (run / "checkpoints" / "latest").is_file()
