"""`cpt status` on run folders as real runs leave them: going on, stopped, failed, killed, finished."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt.checkpoint import RunFolder
from cpt.cli import main
from cpt.cli.status import lines_of
from cpt.observe.attempts import note_attempt
from cpt.parallel.mesh import ALONE
from cpt_launcher import status
from cpt_launcher.status import Status


def told(run: Path, capsys, *words: str) -> str:
    assert main(["status", str(run), *words]) == 0
    return capsys.readouterr().out


def as_json(run: Path, capsys) -> dict:
    return json.loads(told(run, capsys, "--json"))


@pytest.fixture
def endless(data, tmp_path) -> Path:
    """A run that nobody can wait for."""
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 100_000)])
    plain["evaluation"]["every_tokens"] = None
    return runs.write_settings(tmp_path / "run.yaml", plain)


def test_a_run_that_trains_tells_how_far_and_how_fast_and_how_long_still_and_then_that_it_was_killed(
    endless, tmp_path, capsys
):
    run = tmp_path / "run"
    process = runs.start(endless, folder=tmp_path)
    try:
        runs.wait_for_step(run, 12, process)
        runs.wait_for((run / "checkpoints" / "latest").exists, "a checkpoint")
        found = as_json(run, capsys)
        assert found["state"] == "running" and found["step"] >= 12 and found["checkpoint"] >= 5
        assert found["total_tokens"] == 100_000 * runs.TOKENS_A_STEP and found["seconds_left"] > 0
        assert found["ranks"] == 1 and found["starts"] == 1 and found["failures"] == 0
        lines = told(run, capsys)
        assert "tokens/s, " in lines and " left\n" in lines and "newest checkpoint: step " in lines
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = as_json(run, capsys)
    assert found["state"] == "died" and "nobody is at work on it" in found["reason"]
    assert any(line.startswith("rank-00000.log: ") for line in found["last_words"])
    assert "next: the same command goes on from the newest checkpoint" in told(run, capsys)


def test_a_run_that_was_asked_to_stop_is_stopped(endless, tmp_path, capsys):
    runs.cpt("train", endless, before=runs.ask_to_stop_at(3))
    assert as_json(tmp_path / "run", capsys)["state"] == "stopped"


def test_a_finished_run_is_finished(base, capsys):
    assert told(base, capsys).splitlines()[0] == f"{base}: finished"
    assert as_json(base, capsys)["step"] == 20


def test_a_run_that_failed_says_why_and_where(tmp_path, capsys):
    note_attempt(tmp_path, "started", step=0, ranks=4, nodes=["n1", "n2"], job=None, attempt=1)
    note_attempt(tmp_path, "training", step=0)
    note_attempt(tmp_path, "ended", how="failed", step=7, reason="no sign of life", rank=3, node="n2", is_final=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00003.log").write_text("one\ntwo\n")
    lines = told(tmp_path, capsys).splitlines()
    assert lines[0] == f"{tmp_path}: failed: no sign of life (rank 3 node n2)"
    assert "  4 rank(s) on n1, n2" in lines and "  rank-00003.log: two" in lines


def test_a_queued_run_says_what_slurm_says(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho JobId=7 JobState=PENDING Reason=Priority\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    note_attempt(tmp_path, "submitted", job="7")
    lines = told(tmp_path, capsys).splitlines()
    assert lines == [f"{tmp_path}: queued: job 7 waits: Priority", "  job 7, PENDING to SLURM"]


def test_between_two_jobs_of_a_chain_the_next_one_is_told_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    states = 'case "$4" in 7) echo JobId=7 JobState=FAILED;; *) echo JobId=$4 JobState=PENDING Reason=Dependency;; esac'
    scontrol.write_text(f"#!/bin/sh\n{states}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for job in ("7", "8", "9"):
        note_attempt(tmp_path, "submitted", job=job, chain=["7", "8", "9"])
    note_attempt(tmp_path, "launched", step=0, by="job 7", job="7")
    note_attempt(tmp_path, "left", status=138, reason="asked to stop by SIGUSR1", job="7")
    assert told(tmp_path, capsys).splitlines()[0] == f"{tmp_path}: queued: job 8 waits: Dependency"


def test_without_slurms_commands_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    note_attempt(tmp_path, "submitted", job="7")
    assert "SLURM cannot be asked about job 7: scontrol: there is no such command here" in told(tmp_path, capsys)


def test_a_slurm_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\nexec sleep 300\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    note_attempt(tmp_path, "submitted", job="7")
    note_attempt(tmp_path, "launched", step=0, by="job 7", job="7")
    note_attempt(tmp_path, "started", step=0, ranks=4, nodes=["n1", "n2"], job="7", attempt=1)
    note_attempt(tmp_path, "training", step=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 12, "tokens": 240}\n')
    lines = told(tmp_path, capsys)
    assert "scontrol did not answer within 10 s" in lines
    assert lines.startswith(
        f"{tmp_path}: unknown: started, and has not ended as far as its folder tells; whether it is"
    )
    assert "step 12, 240 tokens, " in lines and "4 rank(s) on n1, n2" in lines and "the same command" not in lines


def test_a_run_on_another_machine_is_not_called_dead(tmp_path, capsys):
    note_attempt(tmp_path, "started", step=0, ranks=1, nodes=["another-machine"], job=None, attempt=1)
    note_attempt(tmp_path, "training", step=0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").write_text("step=1\n")
    lines = told(tmp_path, capsys)
    assert "unknown: " in lines and "only on another-machine; its metrics or logs changed " in lines
    assert "next: ask again on another-machine, before anything is started again" in lines


def of_the_page(**more: object) -> Status:
    """The run that docs/CLUSTER.md tells of."""
    known = {
        "run": Path("runs/mine"), "state": "running", "reason": None, "advice": None, "step": 1200, "tokens": 2_457_600,
        "total_tokens": 100_000_000, "loss": 2.91138, "seconds_since_step": 3.2, "tokens_per_second": None,
        "seconds_left": None, "checkpoint": 1000, "seconds_since_checkpoint": 112.0, "starts": 1, "failures": 0,
        "ranks": 32, "nodes": ("gpu-01", "gpu-02", "gpu-03", "gpu-04"), "job": "4711", "job_state": "RUNNING",
        "last_words": (), "notes": (),
    }  # fmt: skip
    return Status(**{**known, **more})


def test_the_page_shows_what_the_command_prints():
    page = (runs.ROOT / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
    shown = [block.splitlines() for block in re.findall(r"```\n(runs/mine: .*?)```", page, re.DOTALL)]
    running = of_the_page(tokens_per_second=182_300.0, seconds_left=535.1)
    queued = of_the_page(
        state="queued", reason="job 4711 waits: BeginTime; it was requeued: asked to stop by SIGUSR1",
        job_state="PENDING",
    )  # fmt: skip
    why = "4 failure(s) without a newer checkpoint, the last one: rank 3 on gpu-02 is gone: no sign of life for 9 s"
    failed = of_the_page(
        state="failed", reason=why,
        advice="when the reason is gone, the same command goes on from the newest checkpoint",
        starts=4, failures=4, job_state=None, seconds_since_step=7500.0, seconds_since_checkpoint=7620.0,
        last_words=("rank-00003.log: 2026-11-30 14:02:11,417 INFO cpt.train step=1200 ...",),
    )  # fmt: skip
    assert shown == [lines_of(running), lines_of(queued), lines_of(failed)]


def test_a_folder_without_a_run_is_a_fault(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_who_trains_there_is_known_by_the_lock_that_the_run_itself_takes(tmp_path):
    assert status._is_taken(tmp_path) is False
    with RunFolder(tmp_path).taken(ALONE):
        assert status._is_taken(tmp_path) is True
    assert status._is_taken(tmp_path) is False
