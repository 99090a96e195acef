"""launcher/run.py under deepspeed, torchrun, srun and plain python: it finds its rank, saves when stopped, goes on.

So it does when what started it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from cpt_harness import runs

from cpt_launcher.rendezvous import pick_free_port

NUM_STEPS = 100_000  # longer than any test: a stop can never come too late
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    """A run that is still going when the stop comes."""
    folder = tmp_path_factory.mktemp("with a space")
    plain = runs.settings(data, folder / "run", [runs.stage(data, "prose", NUM_STEPS)])
    plain["evaluation"]["every_tokens"] = plain["checkpoint"]["every_tokens"] = None
    return runs.write_settings(folder / "run.yaml", plain)


@pytest.fixture(scope="module")
def unbroken(config) -> Path:
    """The same run in one process, of its first hundred steps."""
    run = config.parent / "run"
    runs.cpt("train", config, before=runs.ask_to_stop_at(99))
    return run


def deepspeed() -> list[object]:
    return [sys.executable, BIN / "deepspeed", "--num_accelerators", 2, "--master_port", pick_free_port()]


def processes_of(process) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]


def assert_goes_on_from_a_stop(config: Path, run: Path, unbroken: Path, *words: str) -> None:
    """The stopped run saved at its last step, and goes on with the same windows and, to rounding, the same losses."""
    stopped_at = runs.lines(run / "metrics.jsonl")[-1]["step"]
    assert stopped_at >= 10
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped_at:08d}\n"
    ((_, told),) = runs.cpt("train", config, f"output={run}", *words, before=runs.ask_to_stop_at(stopped_at + 5))
    assert f"going on from {run}/checkpoints/step-{stopped_at:08d}: step {stopped_at}, " in told
    mine, other = (runs.lines(folder / "order.jsonl") for folder in (run, unbroken))
    assert len(mine) == stopped_at + 6 and mine[:100] == other[: len(mine)]
    for mine, other in zip(runs.lines(run / "metrics.jsonl"), runs.lines(unbroken / "metrics.jsonl"), strict=False):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_control_c_under_deepspeed_saves_first_and_the_run_goes_on(config, unbroken, tmp_path):
    run = tmp_path / "run"
    process = runs.start(config, f"output={run}", folder=tmp_path, launcher=deepspeed())
    runs.wait_for_step(run, 10, process)
    ranks = processes_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert runs.end(process) != 0
    psutil.wait_procs(ranks, timeout=60)
    assert "asked to stop: saved at step" in (tmp_path / "out.txt").read_text()
    assert_goes_on_from_a_stop(config, run, unbroken)


def test_sigterm_to_deepspeeds_launch_process_saves_first_and_the_run_goes_on(config, unbroken, tmp_path):
    run = tmp_path / "run"
    process = runs.start(config, f"output={run}", folder=tmp_path, launcher=deepspeed())
    runs.wait_for_step(run, 10, process)
    launch = next(p for p in processes_of(process) if "deepspeed.launcher.launch" in p.cmdline())
    launch.send_signal(signal.SIGTERM)
    assert runs.end(process) == 1  # DeepSpeed's own; those of the ranks do not reach us
    assert "asked to stop: saved at step" in (tmp_path / "out.txt").read_text()
    assert_goes_on_from_a_stop(config, run, unbroken, "zero=2")


def test_torchrun_starts_two_ranks_and_a_stop_is_saved(config, unbroken, tmp_path):
    run = tmp_path / "run"
    launcher = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2]
    process = runs.start(config, f"output={run}", folder=tmp_path, launcher=launcher)
    runs.wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) != 0
    told = (tmp_path / "out.txt").read_text()
    assert "on 2 rank(s) of cpu" in told and "asked to stop: saved at step" in told
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    assert_goes_on_from_a_stop(config, run, unbroken)


# ---- what started it is killed


def kill_and_wait_for_the_end(process, victim: psutil.Process) -> None:
    """Kill one process of a run that was started as `process`; the others are to end soon, by themselves."""
    others = [found for found in (psutil.Process(process.pid), *processes_of(process)) if found != victim]
    victim.kill()
    _, alive = psutil.wait_procs([found for found in others if found.pid != process.pid], timeout=30)
    assert not alive, [found.cmdline() for found in alive]
    runs.end(process)


def test_ranks_end_after_a_save_when_a_part_of_deepspeed_is_killed_and_the_same_command_goes_on(
    config, unbroken, tmp_path
):
    run = tmp_path / "run"
    for part, from_step in (("deepspeed", 10), ("deepspeed.launcher.launch", 30)):
        process = runs.start(config, f"output={run}", folder=tmp_path, launcher=deepspeed())
        runs.wait_for_step(run, from_step, process)
        found = psutil.Process(process.pid)
        if part == "deepspeed.launcher.launch":
            (found,) = (child for child in found.children() if part in child.cmdline())
        kill_and_wait_for_the_end(process, found)
        told = (tmp_path / "out.txt").read_text()
        assert f"the launcher (process {found.pid}, {part}) is gone: this run saves after its next step" in told
        assert (run / "checkpoints" / "latest").read_text() == f"step-{runs.num_lines(run / 'metrics.jsonl'):08d}\n"
    assert "exits with return code = 143" in told  # so launch says of the ranks that had lost their runner
    assert told.count("going on from") == 1 and "another process is training there" not in told
    assert_goes_on_from_a_stop(config, run, unbroken)


def test_ranks_end_after_a_save_when_torchruns_agent_is_killed(config, unbroken, tmp_path):
    run = tmp_path / "run"
    launcher = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2]
    process = runs.start(config, f"output={run}", folder=tmp_path, launcher=launcher)
    runs.wait_for_step(run, 10, process)
    kill_and_wait_for_the_end(process, psutil.Process(process.pid))
    assert f"the launcher (process {process.pid}, torchrun) is gone" in (tmp_path / "out.txt").read_text()
    assert_goes_on_from_a_stop(config, run, unbroken)


def test_a_process_whose_shell_ends_goes_on_to_its_end(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 100)])
    plain["evaluation"]["every_tokens"] = plain["checkpoint"]["every_tokens"] = None
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    in_background = ["nohup", "sh", "-c", '"$@" & wait; true', "sh", sys.executable]
    shell = runs.start(config, folder=tmp_path, launcher=in_background, num_cores=1)
    runs.wait_for_step(tmp_path / "run", 5, shell)
    (process,) = processes_of(shell)
    os.killpg(shell.pid, signal.SIGHUP)  # as a terminal that is closed does; nohup makes it have no effect
    shell.kill()
    assert runs.end(shell) == -signal.SIGKILL
    psutil.wait_procs([process], timeout=runs.SECONDS)
    assert (tmp_path / "run" / "finished.json").exists() and "is gone" not in (tmp_path / "out.txt").read_text()


# ---- srun and plain python


def test_srun_starts_two_tasks_that_find_each_other_and_all_end_with_the_signals_status(config, unbroken, tmp_path):
    run = tmp_path / "run"
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(pick_free_port())}  # fmt: skip
    tasks = [
        runs.start(config, f"output={run}", folder=tmp_path, launcher=[sys.executable], **step,
                   SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in (0, 1)
    ]  # fmt: skip
    runs.wait_for_step(run, 10, tasks[0])
    tasks[1].send_signal(signal.SIGTERM)  # one task is told; all must stop
    assert [runs.end(task) for task in tasks] == [143, 143]
    assert_goes_on_from_a_stop(config, run, unbroken)


def test_a_fault_under_plain_python_ends_with_2_and_without_a_traceback(config, tmp_path):
    process = runs.start(config, "sed=3", folder=tmp_path)
    assert runs.end(process) == 2
    told = (tmp_path / "out.txt").read_text()
    assert told.startswith("cpt train: sed: there is no such setting; did you mean seed") and told.count("\n") == 1


def test_a_second_control_c_ends_at_once_without_saving(config, tmp_path):
    def interrupt_twice() -> None:
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_and_interrupt(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            if record["step"] == 10:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        Journal.step = tell_and_interrupt

    ((status, told),) = runs.cpt("train", config, f"output={tmp_path / 'run'}", before=interrupt_twice)
    assert status == 130 and told.endswith("cpt train: stopped\n")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_launchers_file_needs_no_install_and_no_path(tmp_path):
    process = runs.start("--help", folder=tmp_path)
    assert runs.end(process) == 0
    assert (tmp_path / "out.txt").read_text().startswith("usage: cpt train")
