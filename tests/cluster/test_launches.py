"""One settings file, started in every way that a cluster's users know: the same training each time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cpt_harness import runs
from cpt_harness.slurm_cluster import SlurmCluster
from cpt_harness.slurm_runs import SubmittedRun, write_slow_settings

RUN = [runs.ROOT / "launcher" / "run.py"]
FIRST_NODE = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1)"
STEPS, SECONDS = 12, 300.0
# pip writes such scripts so that a shell starts them, and SLURM looks for what it takes for their interpreter.
scripts_start = pytest.mark.skipif(
    " " in sys.prefix, reason="SLURM starts no script of an environment whose path has a space"
)


@pytest.fixture
def config(data, tmp_path) -> Path:
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", STEPS)])
    plain["batch"]["micro_batch"] = 2  # for up to four ranks
    return runs.write_settings(tmp_path / "run.yaml", plain)


@pytest.fixture
def in_one_process(config, tmp_path) -> Path:
    runs.trained(config, f"output={tmp_path / 'in one process'}")
    return tmp_path / "in one process"


def assert_same_training(run: Path, other: Path, num_ranks: int) -> None:
    """The same windows; and losses that are equal to rounding, for sums are taken in another order."""
    assert (run / "finished.json").exists()
    assert sorted(path.name for path in (run / "logs").glob("rank-*.log")) == [
        f"rank-{rank:05d}.log" for rank in range(num_ranks)
    ]
    assert (run / "order.jsonl").read_text() == (other / "order.jsonl").read_text()
    losses = [[line["loss"] for line in runs.lines(folder / "metrics.jsonl")] for folder in (run, other)]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_srun_with_a_task_a_rank_trains_like_one_process(cluster, config, tmp_path, in_one_process):
    cluster.run("srun", "-N2", "--ntasks-per-node=2", sys.executable, *RUN, config, seconds=SECONDS)
    assert_same_training(tmp_path / "run", in_one_process, 4)


def test_srun_with_a_torchrun_a_node_trains_like_one_process(cluster, config, tmp_path, in_one_process):
    meeting = f"--rdzv-backend=c10d --rdzv-endpoint={FIRST_NODE}:29400 --rdzv-id=$SLURM_JOB_ID"
    command = f"exec torchrun --nnodes=2 --nproc-per-node=1 {meeting} '{RUN[0]}' '{config}'"
    cluster.run("srun", "-N2", "--ntasks-per-node=1", "sh", "-c", command, seconds=SECONDS)
    assert_same_training(tmp_path / "run", in_one_process, 2)


@scripts_start
def test_deepspeed_on_the_node_of_a_job_trains_like_one_process(cluster, config, tmp_path, in_one_process):
    command = ("deepspeed", "--num_accelerators", 2, *RUN, config)
    cluster.run("srun", "-N1", "-n1", *command, seconds=SECONDS)
    assert_same_training(tmp_path / "run", in_one_process, 2)


@scripts_start
def test_deepspeeds_own_launcher_for_slurm_trains_like_one_process(cluster, config, tmp_path, in_one_process):
    """It starts srun, and tells the ranks nothing: they find out from SLURM's variables."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node} slots=1\n" for node in cluster.nodes[:2]))
    # Without the last two it tries ssh, also in a job.
    command = (
        "deepspeed",
        "--launcher",
        "slurm",
        "--hostfile",
        hosts,
        "--no_ssh_check",
        "--master_addr",
        cluster.nodes[0],
    )
    cluster.run("salloc", "-N2", "--ntasks-per-node=1", *command, *RUN, config, seconds=SECONDS)
    assert_same_training(tmp_path / "run", in_one_process, 2)


def test_a_submitted_run_has_a_rank_a_gpu_and_status_follows_it(tmp_path, data, in_one_process):
    with SlurmCluster(tmp_path, nodes=2, gpus=2) as cluster:
        other = cluster.submit("-N2", "--exclusive", "--wrap", "sleep 1000")
        cluster.wait_for_state(other, "RUNNING")
        plain = write_slow_settings(data, tmp_path, STEPS)
        run = SubmittedRun(cluster, plain, "--nodes", 2, "--gpus-per-node", 2, rest=10)
        assert run.status()["state"] == "queued"
        cluster.run("scancel", other)
        run.wait_for_step(2)
        assert run.status()["state"] == "running"
        run.hurry()
        run.wait_until_finished()
        assert run.status()["state"] == "finished"
    assert_same_training(run.path, in_one_process, 4)


def test_plain_python_in_a_batch_script_is_one_rank(cluster, config, tmp_path, in_one_process):
    number = cluster.submit("-N2", "-n2", "--wrap", f"'{sys.executable}' '{RUN[0]}' '{config}'", folder=tmp_path)
    cluster.wait_for_state(number, "COMPLETED", seconds=SECONDS)
    assert_same_training(tmp_path / "run", in_one_process, 1)
