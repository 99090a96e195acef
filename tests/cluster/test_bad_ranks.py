"""One rank dies, is stopped or hangs: it is named, all ranks write down where they were, the job starts them again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from cpt_harness import runs
from cpt_harness.slurm_runs import STEPS, SubmittedRun, row, write_slow_settings


def stacks(run: SubmittedRun) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run.path / "logs").glob("stacks-rank-*.txt"))}


def assert_goes_on(run: SubmittedRun, undisturbed: Path, fault: str, injected: str, began: float) -> str:
    """The second rank is named, and the job starts both again without going back to the queue. A line of the table."""
    ended = run.wait_for_event("ended")
    assert (ended["how"], ended["rank"], ended["node"]) == ("failed", 1, run.nodes()[1])
    assert ended["reason"] in run.wait_for_event("restarting")["reason"]
    run.hurry()
    run.wait_until_finished()
    assert run.cluster.job(run.job)["Restarts"] == "0"
    runs.assert_same_but_for_checkpoints(runs.story(run.path), runs.story(undisturbed))
    return row(run, fault, injected, began, f"`{ended['reason']}`", "ranks were started again in the job")


def test_ranks_are_started_again_when_one_is_killed(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(25)
    began = time.time()
    cluster.signal(run.nodes()[1], signal.SIGKILL, "launcher/run.py")
    tell(assert_goes_on(run, undisturbed, "a rank is killed, as when memory runs out", "SIGKILL", began))
    assert list(stacks(run)) == ["stacks-rank-00000.txt"]


def test_ranks_are_started_again_when_one_is_stopped(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(25)
    began = time.time()
    cluster.signal(run.nodes()[1], signal.SIGSTOP, "launcher/run.py")
    tell(assert_goes_on(run, undisturbed, "a rank gets no time at all", "SIGSTOP", began))


def test_ranks_are_started_again_when_one_hangs_in_reading_data(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(25)
    run.let_hang(rank=1)
    began = time.time()
    tell(assert_goes_on(run, undisturbed, "a rank hangs in reading data", "a read that does not return", began))
    written = stacks(run)
    assert list(written) == ["stacks-rank-00000.txt", "stacks-rank-00001.txt"]
    assert "batch_or_hang" in written["stacks-rank-00001.txt"]


def test_a_run_that_may_not_start_again_fails_and_status_says_why(cluster, data, tmp_path):
    # A checkpoint would be progress, after which it may.
    config = write_slow_settings(data, tmp_path, save_every=STEPS)
    run = SubmittedRun(cluster, config, "--nodes", 2, "--restarts", 0)
    run.wait_for_step(5)
    assert run.status()["state"] == "running"
    node = run.nodes()[1]
    cluster.signal(node, signal.SIGKILL, "launcher/run.py")
    cluster.wait_for_state(run.job, "FAILED")
    assert run.status()["state"] == "failed"
    assert f"rank 1 on {node} is gone" in run.cpt("status", run.path)
