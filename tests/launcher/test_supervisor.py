"""The supervisor starts a command until the run says that it is finished: real processes, a made-up run.

A file `acts` says what each start of the made-up run does, a line a start. SLURM's commands are stand-ins that write
down how they were called; tests/cluster has the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cpt_harness import disks, runs

from cpt.checkpoint.run_folder import FINISHED
from cpt.observe.attempts import note_attempt, read_attempts
from cpt_launcher.attempt import signal_for
from cpt_launcher.run_folders import FINISHED_FILE

RUN_PY = """
import pathlib, signal, subprocess, sys, time
sys.path.insert(0, sys.argv[3])
from cpt.observe.attempts import note_attempt, read_attempts
folder = pathlib.Path(sys.argv[1])
number = sum(event["event"] == "launched" for event in read_attempts(folder))
for act in pathlib.Path(sys.argv[2]).read_text().splitlines()[number - 1].split():
    word, _, value = act.partition("=")
    if word == "save":
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "latest").write_text(f"step-{int(value):08d}")
    elif word == "fail":
        note_attempt(folder, "ended", how="failed", reason=value)
    elif word == "past":
        note_attempt(folder, "ended", how="failed", reason=value, time=1.0)
    elif word == "sleep":
        time.sleep(float(value))
    elif word == "final":
        note_attempt(folder, "ended", how="failed", reason=value, is_final=True)
    elif word == "stopped":
        note_attempt(folder, "ended", how="stopped", signal=int(value))
    elif word == "finish":
        (folder / "finished.json").write_text("{}")
    elif word == "touch":
        pathlib.Path(value).touch()
    elif word == "heed":  # within one look of the supervisor's
        note_attempt(folder, "ended", how="stopped", signal=15, by="file")
    elif word == "away":
        signal.signal(int(value), signal.SIG_DFL)
        signal.raise_signal(int(value))
    elif word == "started":
        note_attempt(folder, "started")
    elif word == "until":
        while not pathlib.Path(value).exists():
            time.sleep(0.01)
    elif word == "orphan":
        code = "import time; time.sleep(300)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    elif word == "wait":
        while not (folder / "stop").exists():
            time.sleep(0.01)
        note_attempt(folder, "ended", how="stopped", signal=15)
    elif word == "deaf":
        for one in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(one, signal.SIG_IGN)
        (folder / "deaf").touch()
        time.sleep(300)
    elif word == "exit":
        sys.exit(int(value))
"""


def supervise(folder: Path, *acts: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """The supervisor of the made-up run in `folder`/run; its words go to `folder`/out.txt."""
    (folder / "run.py").write_text(RUN_PY)
    (folder / "acts").write_text("\n".join(acts))
    command = [sys.executable, folder / "run.py", folder / "run", folder / "acts", runs.ROOT]
    words = [sys.executable, runs.ROOT / "launcher" / "supervise.py", "--run", folder / "run", "--backoff", "0.01"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    with (folder / "out.txt").open("ab") as out:
        return subprocess.Popen(
            list(map(str, [*words, *options, "--", *command])), cwd=folder, env={**clean, **environment}, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip


def events(folder: Path, *names: str) -> list[dict]:
    return [event for event in read_attempts(folder / "run") if event["event"] in names]


def test_the_marker_of_a_finished_run_is_the_one_that_runs_write():
    assert FINISHED_FILE == FINISHED


def test_a_run_that_fails_is_started_again_until_it_is_finished(tmp_path):
    assert runs.end(supervise(tmp_path, "fail=fire exit=1", "save=10 exit=0", "finish exit=1")) == 0
    restarts = events(tmp_path, "restarting")
    reasons = [event["reason"].partition(";")[0] for event in restarts]
    assert reasons == ["fire", "ended with status 0, without finishing"]
    assert [event["failures"] for event in restarts] == [1, 0]  # the second one had saved


def test_the_runs_of_a_plan_are_done_when_all_are(tmp_path):
    (tmp_path / "other").mkdir()
    acts = ["finish", "save=10 exit=1", f"finish touch={tmp_path}/other/finished.json"]
    assert runs.end(supervise(tmp_path, *acts, options=("--run", str(tmp_path / "other")))) == 0
    assert len(events(tmp_path, "launched")) == 3


def test_a_finished_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FINISHED).write_text("{}")
    assert runs.end(supervise(tmp_path)) == 0
    assert events(tmp_path, "launched") == []


def test_failures_in_a_row_without_a_newer_checkpoint_are_borne_so_many_times(tmp_path):
    assert runs.end(supervise(tmp_path, *["exit=1"] * 9, options=("--restarts", "2"))) == 1
    assert len(events(tmp_path, "launched")) == 3
    (left,) = events(tmp_path, "left")
    assert (left["status"], left["failures"]) == (1, 3)


def test_each_new_checkpoint_begins_the_count_anew(tmp_path):
    acts = [f"save={10 * number} exit=1" for number in range(1, 6)]
    assert runs.end(supervise(tmp_path, *acts, "finish", options=("--restarts", "1"))) == 0


@pytest.mark.parametrize(("act", "status"), [("exit=2", 2), ("final=never exit=143", 1)])
def test_what_would_end_in_the_same_way_again_is_not_started_again(tmp_path, act, status):
    assert runs.end(supervise(tmp_path, act, "finish")) == status
    assert len(events(tmp_path, "launched")) == 1


def test_a_command_that_is_not_there_is_told_with_status_2(tmp_path):
    words = [sys.executable, runs.ROOT / "launcher/supervise.py", "--run", tmp_path / "run", "--", "no-such-program"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=runs.SECONDS, check=False)
    assert (
        done.returncode == 2 and "no-such-program cannot be started" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_handed_on_by_the_stop_file_twice_in_a_row_too(tmp_path, number):
    process = supervise(tmp_path, "wait", "finish")
    runs.wait_for(lambda: events(tmp_path, "launched"), "the start")
    time.sleep(0.3)
    process.send_signal(number)
    process.send_signal(number)
    assert runs.end(process) == 128 + number
    assert len(events(tmp_path, "launched")) == 1 and not (tmp_path / "run" / "stop").exists()


def test_a_signal_in_the_pause_between_two_starts_ends_it(tmp_path):
    process = supervise(tmp_path, "exit=1", "finish", options=("--backoff", "300"))
    runs.wait_for(lambda: events(tmp_path, "restarting"), "the pause")
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) == 143


def test_what_does_not_end_within_the_grace_is_killed(tmp_path):
    process = supervise(tmp_path, "deaf", options=("--grace", "0.5"))
    runs.wait_for((tmp_path / "run" / "deaf").exists, "a run that hears nothing")
    process.send_signal(signal.SIGTERM)
    assert runs.end(process) == 143
    assert "killed" in (tmp_path / "out.txt").read_text()


def test_on_a_full_disk_which_takes_no_notes_it_gives_up_all_the_same(tmp_path):
    with disks.in_memory(tmp_path / "run", 4096 * 16) as full:
        with suppress(OSError), (full / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert runs.end(supervise(tmp_path, "exit=1", options=("--restarts", "2"))) == 1
        assert read_attempts(full) == []
    assert 3 <= (tmp_path / "out.txt").read_text().count("without finishing") <= 5


def test_a_disk_that_dies_under_a_run_does_not_end_the_supervisor_before_its_command(tmp_path):
    with disks.on_device(tmp_path / "run", 16 * disks.MIB) as disk:
        process = supervise(tmp_path, f"until={tmp_path}/go exit=1", options=("--restarts", "0"))
        runs.wait_for(lambda: events(tmp_path, "launched"), "the start")
        disk.die()
        told = tmp_path / "out.txt"
        runs.wait_for(lambda: "which ends nothing" in told.read_text() or process.poll() is not None, "its word")
        (tmp_path / "go").touch()
        assert runs.end(process) == 1
    assert "ends here, with status 1: 1 failure(s)" in told.read_text()


def test_an_end_that_a_slow_clock_tells_is_not_taken_for_an_old_one(tmp_path):
    assert runs.end(supervise(tmp_path, "past=fire sleep=4 exit=1", "finish")) == 0
    assert "killed" not in (tmp_path / "out.txt").read_text()


@pytest.mark.long
def test_a_command_that_does_not_end_when_the_run_has_is_killed(tmp_path, monkeypatch):
    process = supervise(tmp_path, "fail=gone deaf", "finish")  # as srun waits for a node that is gone
    assert runs.end(process) == 0
    assert "its command has not: killed" in (tmp_path / "out.txt").read_text()
    assert [event["reason"] for event in events(tmp_path, "restarting")] == ["gone"]


def test_nothing_of_an_attempt_outlives_it(tmp_path):
    process = supervise(tmp_path, "orphan exit=1", "finish", options=("--grace", "1"))
    found = runs.wait_for(lambda: psutil.Process(process.pid).children(recursive=True), "the run")
    assert runs.end(process) == 0
    assert "left behind by the command, and killed" in (tmp_path / "out.txt").read_text()
    assert not [one for one in psutil.process_iter(["cmdline"]) if "time.sleep(300)" in str(one.info["cmdline"])
                and one.status() != psutil.STATUS_ZOMBIE and one.create_time() >= found[0].create_time()]  # fmt: skip


def test_where_nothing_was_noted_it_says_that_the_folders_may_differ(tmp_path):
    assert runs.end(supervise(tmp_path, "exit=0", options=("--restarts", "0"))) == 1
    told = f"nothing was noted in {tmp_path}/run: is that the `output` of its settings, as --run should be?"
    assert told in events(tmp_path, "left")[0]["reason"]


def test_ranks_asked_to_stop_by_others_end_the_supervision_outside_of_slurm(tmp_path):
    assert runs.end(supervise(tmp_path, "stopped=15 exit=143", "finish")) == 143


def test_ranks_that_miss_their_launcher_were_not_asked_to_stop_by_anybody(tmp_path):
    assert runs.end(supervise(tmp_path, "stopped=15 orphan exit=143", "finish", options=("--grace", "0.5"))) == 0
    told = "what started its ranks ended with status 143 before them"
    assert [event["reason"] for event in events(tmp_path, "restarting")] == [told]


def test_the_environment_is_kept_without_what_looks_like_a_secret(tmp_path):
    kept = {"NCCL_DEBUG": "WARN", "TORCH_API_KEY": "hidden", "PYTHON_TOKEN": "hidden", "HF_HOME": "other"}
    assert runs.end(supervise(tmp_path, "finish", **kept)) == 0
    (path,) = (tmp_path / "run" / "logs").glob("environment-*.txt")
    text = path.read_text()
    assert "NCCL_DEBUG=WARN\n" in text and "TORCH_API_KEY=(left out)\n" in text
    assert "hidden" not in text and "HF_HOME" not in text and path.stat().st_mode & 0o077 == 0


def test_what_it_writes_is_for_nobody_else_to_change_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        assert runs.end(supervise(tmp_path, "finish")) == 0
    finally:
        os.umask(before)
    written = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    ours = [path for path in written if path.name != "finished.json"]  # which the made-up run wrote
    assert ours and not [path for path in ours if path.stat().st_mode & 0o022]


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["srun", "-n", "2", "python", "run.py"], signal.SIGUSR1),
        (["/usr/bin/python3", "-u", "run.py"], signal.SIGTERM),
        (["/usr/bin/srun", "--wait=60", "/venv/bin/python3", "-u", "run.py"], signal.SIGUSR1),
        (["srun", "torchrun", "run.py"], None),
        (["srun", "-N2", "python", "-m", "torch.distributed.run", "run.py"], None),
        (["srun", "-N2", "deepspeed", "--no_ssh", "run.py"], None),
        (["srun", "apptainer", "exec", "image.sif", "python", "run.py"], None),
        (["srun", "bash", "-c", "python run.py"], None),
        (["deepspeed", "run.py"], None),
        (["torchrun", "run.py"], None),
        (["python", "-m", "torch.distributed.run", "run.py"], None),
        (["python3.11", "/opt/bin/deepspeed", "run.py"], None),
        (["bash", "-c", "python run.py"], None),
    ],
)
def test_only_commands_that_hand_a_signal_on_get_one(command, number):
    assert signal_for(command) == number


# ---- in a SLURM job


def stand_ins(folder: Path, state: str = "RUNNING", node_state: str = "ALLOCATED", squeue: str = ":") -> dict[str, str]:
    """SLURM's commands, which write down their words, and the environment of a job that finds them."""
    (folder / "bin").mkdir()
    told = {
        "scontrol": f'case "$*" in *"show job"*) echo "JobId=7 JobState={state} Reason=None";; '
        f'*"show node"*) echo "NodeName=n1 State={node_state}";; esac',
        "squeue": squeue,
        "scancel": ":",
    }
    for name, says in told.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/called\n{says}\n')
        path.chmod(0o755)
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_NUM_NODES": "1"}  # fmt: skip


def called(folder: Path) -> list[str]:
    return (folder / "called").read_text().splitlines()


def test_before_the_time_limit_the_job_is_requeued_when_the_run_has_saved(tmp_path):
    process = supervise(tmp_path, "wait", **stand_ins(tmp_path))
    runs.wait_for(lambda: events(tmp_path, "launched"), "the start")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert runs.end(process) == 128 + signal.SIGUSR1
    assert "scontrol requeue 7" in called(tmp_path)
    assert [event["asked"] for event in events(tmp_path, "requeued")] == [signal.SIGUSR1]


def test_a_preemption_that_only_the_ranks_are_told_of_requeues_the_job(tmp_path):
    assert runs.end(supervise(tmp_path, "stopped=15 exit=0", **stand_ins(tmp_path))) == 143
    assert "scontrol requeue 7" in called(tmp_path)


def test_the_stop_file_of_a_person_ends_the_job_for_good(tmp_path):
    process = supervise(tmp_path, "wait", "finish", **stand_ins(tmp_path))
    runs.wait_for(lambda: events(tmp_path, "launched"), "the start")
    (tmp_path / "run" / "stop").touch()
    assert runs.end(process) == 143
    assert "scontrol requeue 7" not in called(tmp_path)
    assert "asked to stop by the file stop" in (tmp_path / "out.txt").read_text()
    assert [event["reason"] for event in events(tmp_path, "left")] == ["asked to stop by the file stop"]


def test_a_stop_file_from_before_is_an_old_one_and_is_said_to_go(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert runs.end(supervise(tmp_path, "finish")) == 0
    assert "run/stop was there before this start: removed, and not heeded" in (tmp_path / "out.txt").read_text()


def chained(folder: Path, **more: str) -> dict[str, str]:
    """The job of `stand_ins` as the first of a chain of two."""
    (folder / "run").mkdir()
    note_attempt(folder / "run", "submitted", job="7", chain=["7", "8"])
    return stand_ins(folder, **more)


def test_the_stop_file_of_a_person_cancels_the_jobs_that_were_to_go_on(tmp_path):
    process = supervise(tmp_path, "wait", "finish", **chained(tmp_path))
    runs.wait_for(lambda: events(tmp_path, "launched"), "the start")
    (tmp_path / "run" / "stop").touch()
    assert runs.end(process) == 143
    assert "scancel --state=PENDING 7 8" in called(tmp_path)


def test_a_stop_file_that_the_ranks_heed_before_the_supervisor_sees_it_is_a_persons(tmp_path):
    assert runs.end(supervise(tmp_path, "heed exit=143", "finish", **chained(tmp_path))) == 143
    assert "scontrol requeue 7" not in called(tmp_path) and "scancel --state=PENDING 7 8" in called(tmp_path)


def test_a_stop_file_that_comes_when_the_ranks_have_failed_is_heeded(tmp_path):
    acts = [f"fail=fire touch={tmp_path}/run/stop exit=1", "finish"]
    assert runs.end(supervise(tmp_path, *acts, **chained(tmp_path))) == 143
    assert len(events(tmp_path, "launched")) == 1 and not (tmp_path / "run" / "stop").exists()
    assert "scontrol requeue 7" not in called(tmp_path)


def test_a_stop_file_in_the_pause_between_two_starts_ends_it(tmp_path):
    process = supervise(tmp_path, "exit=1", "finish", options=("--backoff", "300"))
    runs.wait_for(lambda: events(tmp_path, "restarting"), "the pause")
    (tmp_path / "run" / "stop").touch()
    assert runs.end(process) == 143


def test_a_stop_file_that_comes_after_a_signal_is_heeded_too(tmp_path):
    process = supervise(tmp_path, f"deaf until={tmp_path}/go", options=("--grace", "2"), **chained(tmp_path))
    runs.wait_for((tmp_path / "run" / "deaf").exists, "the start")
    process.send_signal(signal.SIGUSR1)
    runs.wait_for((tmp_path / "run" / "stop").exists, "the supervisor's own")
    time.sleep(0.1)
    (tmp_path / "run" / "stop").touch()
    assert runs.end(process) == 128 + signal.SIGUSR1
    assert "scontrol requeue 7" not in called(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_are_taken_away_before_they_have_started_requeue_the_job(tmp_path, number):
    process = supervise(tmp_path, f"away={int(number)}", "finish", **stand_ins(tmp_path))
    assert runs.end(process) == 128 + number
    assert "scontrol requeue 7" in called(tmp_path)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_a_cancelled_job_is_not_requeued(tmp_path, state):
    assert runs.end(supervise(tmp_path, "stopped=15 exit=0", **stand_ins(tmp_path, state))) == 143
    assert "scontrol requeue 7" not in called(tmp_path)
    assert events(tmp_path, "not_requeued")[0]["reason"] == f"job 7 is {state}"


def test_a_job_that_may_not_be_requeued_is_not(tmp_path):
    process = supervise(tmp_path, "stopped=15 exit=0", options=("--no-requeue",), **stand_ins(tmp_path))
    assert runs.end(process) == 143
    assert "scontrol requeue 7" not in called(tmp_path)


@pytest.mark.parametrize("state", ["DOWN*", "IDLE+DRAIN", "ALLOCATED*", "MIXED+NOT_RESPONDING"])
def test_a_failure_on_a_bad_node_requeues_the_job(tmp_path, state):
    assert runs.end(supervise(tmp_path, "fail=gone exit=1", "finish", **stand_ins(tmp_path, node_state=state))) == 1
    assert events(tmp_path, "requeued")[0]["reason"] == f"not well: n1 ({state}); gone"


def test_a_failure_on_good_nodes_starts_again_in_the_same_job(tmp_path):
    assert runs.end(supervise(tmp_path, "fail=gone exit=1", "finish", **stand_ins(tmp_path))) == 0
    assert "scontrol requeue 7" not in called(tmp_path)


def test_the_step_of_a_dead_node_is_not_waited_for_in_a_job_that_slurm_ends(tmp_path):
    """SLURM ends a job whose node is down, but waits for its script; the step is there until that ends."""
    step_of_first_start = f"test -e {tmp_path}/begun && echo 7.0; touch {tmp_path}/begun"
    job = stand_ins(tmp_path, "COMPLETING", "DOWN*", step_of_first_start)
    options = ("--grace", "1000", "--restarts", "0")
    assert runs.end(supervise(tmp_path, "fail=gone exit=1", options=options, **job)) == 1
    assert not any(line.startswith("scancel") for line in called(tmp_path))


def test_a_step_that_heeds_the_file_of_the_supervisor_was_not_asked_by_a_person(tmp_path):
    """Its ranks are elsewhere, and its srun is dead: asked to save, they say by what."""
    word = '{"event": "ended", "time": 1, "how": "stopped", "signal": 15, "by": "file"}'
    step = f"""test -e {tmp_path}/begun && ! test -e {tmp_path}/gone && if test -e {tmp_path}/run/stop
    then echo '{word}' >>{tmp_path}/run/attempts.jsonl; touch {tmp_path}/gone
    else echo 7.0
    fi; true"""
    job = stand_ins(tmp_path, squeue=step)
    assert runs.end(supervise(tmp_path, f"touch={tmp_path}/begun exit=1", "finish", **job)) == 0
    told = "what started its ranks ended with status 1 before them"
    assert [event["reason"] for event in events(tmp_path, "restarting")] == [told]


def test_failures_are_counted_over_requeues_of_the_same_job(tmp_path):
    job = stand_ins(tmp_path, node_state="DOWN")
    ends = [runs.end(supervise(tmp_path, *["fail=gone exit=1"] * 9, options=("--restarts", "1"), **job)) for _ in "abc"]
    assert ends == [1, 1, 1] and len(events(tmp_path, "requeued")) == 1
    assert events(tmp_path, "left")[0]["failures"] == 2


@pytest.mark.parametrize("act", ["finish", "final=never exit=1", "exit=2"])
def test_when_there_is_nothing_left_to_do_the_rest_of_the_chain_is_cancelled(tmp_path, act):
    (tmp_path / "run").mkdir()
    for job in ("7", "8", "9"):
        note_attempt(tmp_path / "run", "submitted", job=job, chain=["7", "8", "9"])
    runs.end(supervise(tmp_path, act, options=("--no-requeue",), **stand_ins(tmp_path)))
    assert "scancel --state=PENDING 7 8 9" in called(tmp_path)


def test_a_job_of_a_chain_that_is_stopped_leaves_the_rest_to_go_on(tmp_path):
    (tmp_path / "run").mkdir()
    note_attempt(tmp_path / "run", "submitted", job="7", chain=["7", "8"])
    job = stand_ins(tmp_path)
    assert runs.end(supervise(tmp_path, "stopped=10 exit=138", options=("--no-requeue",), **job)) == 138
    assert not [line for line in called(tmp_path) if line.startswith("scancel")]


def test_one_job_of_an_array_asks_for_itself_alone(tmp_path):
    job = {**stand_ins(tmp_path), "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    assert runs.end(supervise(tmp_path, "stopped=15 exit=0", **job)) == 143
    assert "scontrol requeue 9_2" in called(tmp_path)


def test_in_a_step_of_several_tasks_nothing_is_started(tmp_path):
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert runs.end(supervise(tmp_path, "finish", **step)) == 2
    assert "start it once, in the batch script" in (tmp_path / "out.txt").read_text()
