"""SLURM takes the nodes away: at the time limit, for a more important job, at somebody's wish. The run saves each time.

Where it goes on, it does so to the bit as if nothing had happened: the mesh is the same.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from cpt_harness import runs
from cpt_harness.slurm_runs import SubmittedRun, row, write_slow_settings


def saved_step(run: SubmittedRun) -> int:
    return int((run.path / "checkpoints" / "latest").read_text().removeprefix("step-"))


def assert_saved_and_went_on(run: SubmittedRun, undisturbed: Path, signal: int) -> None:
    """One stop, with nothing lost; then to the end."""
    run.hurry()
    run.wait_until_finished()
    (stop, end), starts = run.events("ended"), run.events("started")
    assert (stop["how"], stop["signal"], end["how"]) == ("stopped", signal, "finished")
    assert [start["step"] for start in starts] == [0, stop["step"]] and not run.events("resumed_over")
    runs.assert_same_but_for_checkpoints(runs.story(run.path), runs.story(undisturbed))


def row_of(run: SubmittedRun, fault: str, injected: str, result: str, began: float) -> str:
    """A line of the table for a run that saved when it was asked to, at the time `began`."""
    return row(run, fault, injected, began, f"saved at step {run.events('ended')[0]['step']}", result)


def test_a_run_saves_before_the_time_limit_and_its_job_is_requeued_until_it_is_finished(
    cluster, config, undisturbed, tell
):
    run = SubmittedRun(cluster, config, "--nodes", 2, "--time", "0:10:00")
    run.wait_for_step(20)
    hours, minutes, seconds = map(int, cluster.job(run.job)["RunTime"].split(":"))
    # So that the signal, a minute before the limit, is due soon.
    minutes = math.ceil(hours * 60 + minutes + (seconds + 70) / 60)
    began = time.time()
    cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    assert "USR1" in run.wait_for_event("requeued")["reason"]
    assert_saved_and_went_on(run, undisturbed, 10)
    tell(row_of(run, "time limit", "a limit that ends within two minutes", "requeued, went on", began))


def test_a_run_that_is_preempted_saves_within_the_grace_time_and_goes_on_after_the_other_job(
    cluster, config, undisturbed, tell
):
    run = SubmittedRun(cluster, config, "--nodes", 2, "--partition", "low")
    run.wait_for_step(20)
    began = time.time()
    other = cluster.submit("-N3", "--exclusive", "-p", "high", "--wrap", "sleep 1000")
    cluster.wait_for_state(other, "RUNNING")
    assert run.status()["state"] == "queued"
    cluster.run("scancel", other)
    assert_saved_and_went_on(run, undisturbed, 15)
    tell(row_of(run, "preemption", "a job of a higher partition wants all nodes", "requeued, went on", began))


def test_a_job_that_is_requeued_by_hand_saves_and_goes_on(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(20)
    began = time.time()
    cluster.run("scontrol", "requeue", run.job)
    assert_saved_and_went_on(run, undisturbed, 15)
    tell(row_of(run, "requeued by hand", "`scontrol requeue`", "went on", began))


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster, data, tmp_path, tell):
    folder = tmp_path / """it's "a" $(touch pwned) `touch pwned` run"""
    folder.mkdir()
    run = SubmittedRun(cluster, write_slow_settings(data, folder), "--nodes", 2)
    run.wait_for_step(20)
    began = time.time()
    cluster.run("scancel", run.job)
    cluster.wait_for_state(run.job, "CANCELLED")
    ended = run.wait_for_event("ended")
    assert (ended["how"], ended["step"]) == ("stopped", saved_step(run)) and ended["step"] >= 20
    time.sleep(cluster.requeue_wait + 3)
    assert cluster.job_state(run.job) == "CANCELLED" and len(run.events("started")) == 1
    assert run.status()["state"] == "stopped"
    assert not list(tmp_path.rglob("pwned"))
    tell(row_of(run, "cancelled", "`scancel`", "stays cancelled", began))
