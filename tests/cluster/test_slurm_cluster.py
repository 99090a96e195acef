"""The cluster that the other tests of this folder stand on: nodes are apart from one another, die, leave nothing."""

from __future__ import annotations

import os
from pathlib import Path

from cpt_harness import runs
from cpt_harness.slurm_cluster import FREEZER, SlurmCluster


def test_each_task_runs_on_a_node_of_its_own(cluster):
    told = cluster.run("srun", "-N3", "sh", "-c", "echo $(hostname) $(hostname --ip-address) $(ls /dev/shm)").stdout
    names, addresses = zip(*map(str.split, told.splitlines()), strict=True)
    assert sorted(names) == cluster.nodes and len(set(addresses)) == 3


def test_a_node_that_is_cut_off_answers_again_when_it_is_healed(cluster):
    first, second = cluster.nodes[:2]
    ping = ("srun", "-w", first, "bash", "-c", f"timeout 2 bash -c '</dev/tcp/{second}/6818' || exit 7")
    assert cluster.run(*ping).returncode == 0
    cluster.cut(second)
    assert cluster.run(*ping, check=False).returncode == 7
    cluster.heal(second)
    assert cluster.run(*ping).returncode == 0


def test_a_job_whose_node_loses_power_runs_again_on_another(cluster):
    number = cluster.submit("-N2", "--wrap", "sleep 100")
    cluster.wait_for_state(number, "RUNNING")
    cluster.power_off(cluster.nodes[0])
    cluster.wait_for_state(number, "PENDING")
    job = cluster.wait_for_state(number, "RUNNING")
    assert job["Restarts"] == "1" and cluster.nodes[0] not in job["NodeList"]
    cluster.boot(cluster.nodes[0])
    cluster.wait_for_nodes("idle", cluster.nodes[0])


def test_two_clusters_at_once_do_not_meet_and_nothing_is_left_of_them(tmp_path):
    with SlurmCluster(tmp_path / "one", nodes=1) as one, SlurmCluster(tmp_path / "other", nodes=1) as other:
        told = [cluster.run("srun", "hostname").stdout.split() for cluster in (one, other)]
        assert told == [one.nodes, other.nodes]
        number = one.submit("--wrap", "sleep 100")
        one.wait_for_state(number, "RUNNING")
        runs.wait_for(lambda: one.processes(one.nodes[0], "sleep 100"), "the job's processes")
        processes = [*one.processes(one.nodes[0]), *one.processes(one.login)]
    assert not [number for number in processes if os.path.exists(f"/proc/{number}/exe")]
    assert not one.home.exists() and not list(FREEZER.glob(f"slurm_{one.nodes[0]}"))
    assert f"to-{one.nodes[0]}" not in Path("/proc/net/dev").read_text()
