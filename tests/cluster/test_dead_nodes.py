"""A node dies under a run: the others end with one message that names it, and the run goes on from its checkpoint.

On another node to the bit as if nothing had happened; on fewer with the same windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from cpt_harness import runs
from cpt_harness.slurm_cluster import SlurmCluster
from cpt_harness.slurm_runs import SubmittedRun, row


def survive(run: SubmittedRun, fault: str, injected: str, happen: Callable[[str], None], rank: int) -> str:
    """Let a fault come upon the node of a rank; the run goes on without that node. A line of the table."""
    run.wait_for_event("training")
    node = run.nodes()[rank]
    run.wait_for_step(25)  # the checkpoint of step 20 is whole
    began = time.time()
    happen(node)
    ended = run.wait_for_event("ended")
    assert ended["how"] == "failed" and f"rank {ended['rank']} on {ended['node']} is gone" in ended["reason"]
    run.hurry()
    again = run.wait_for_event("started", 2)
    assert again["step"] >= 20 and node not in again["nodes"]
    run.wait_until_finished()
    result = f"went on on {len(again['nodes'])} node(s)"
    return row(run, fault, injected, began, f"`{ended['reason']}`", result)


def assert_named(run: SubmittedRun, rank: int) -> None:
    """One message named the rank that was gone; the other one has it in its log."""
    ended = run.events("ended")[0]
    assert ended["rank"] == rank
    assert (run.path / "logs" / f"rank-{1 - rank:05d}.log").read_text().count(ended["reason"]) == 1
    # The job's log is written from the first node, and lacks what was said when that was gone.
    assert run.log().count(f"cpt train: {ended['reason']}") == (1 if rank else 0)


def test_a_run_goes_on_on_a_spare_node_when_one_crashes(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    tell(survive(run, "a node crashes", "all its processes are killed", cluster.crash, rank=1))
    assert_named(run, 1)
    runs.assert_same_but_for_checkpoints(runs.story(run.path), runs.story(undisturbed))


def test_a_run_goes_on_when_the_node_of_rank_0_and_the_batch_script_loses_power(cluster, config, undisturbed, tell):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    tell(
        survive(
            run, "the first node loses power", "its network falls silent, then all is killed", cluster.power_off, rank=0
        )
    )
    runs.assert_same_but_for_checkpoints(runs.story(run.path), runs.story(undisturbed))


def test_a_run_goes_on_on_fewer_nodes_when_one_is_cut_off_and_its_ranks_there_end(tmp_path, config, undisturbed, tell):
    with SlurmCluster(tmp_path, nodes=2) as cluster:
        run = SubmittedRun(cluster, config, "--nodes", 2, "--min-nodes", 1)
        tell(survive(run, "a node is cut off", "its port is taken off the switch", cluster.cut, rank=1))
        # Each side finds the other one gone. Here both still see the files, and who is first tells.
        assert not cluster.processes(cluster.nodes[1], "launcher/run.py")
    found, expected = runs.story(run.path), runs.story(undisturbed)
    assert (found["order"], found["ledger"]) == (expected["order"], expected["ledger"])
    for mine, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_a_link_that_fails_for_a_moment_costs_nothing(cluster, config, undisturbed):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(15)
    cluster.cut(run.nodes()[1])
    time.sleep(3)
    cluster.heal(run.nodes()[1])
    run.hurry()
    run.wait_until_finished()
    assert len(run.events("started")) == 1
    runs.assert_same_story(runs.story(run.path), runs.story(undisturbed))


def test_slurms_daemons_may_die_and_come_back_under_a_run(cluster, config, undisturbed):
    run = SubmittedRun(cluster, config, "--nodes", 2)
    run.wait_for_step(15)
    cluster.kill_controller()
    cluster.kill_slurmd(run.nodes()[1])
    run.wait_for_step(run.step() + 15)
    cluster.start_slurmd(run.nodes()[1])
    cluster.start_controller()
    run.hurry()
    run.wait_until_finished()
    assert len(run.events("started")) == 1
    runs.assert_same_story(runs.story(run.path), runs.story(undisturbed))
