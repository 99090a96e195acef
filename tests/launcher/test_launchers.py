"""The processes that started this one are known for launchers or not, and missed when they have ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt_launcher import launchers
from cpt_launcher.launchers import Launcher, Launchers, find_launchers, program_of

PROGRAMS = {
    "/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launcher/run.py a.yaml": "deepspeed",
    "python3.11 -u -m deepspeed.launcher.launch --world_info=e30= launcher/run.py": "deepspeed.launcher.launch",
    "/usr/bin/python3 -W ignore -X dev /opt/torchrun --standalone launcher/run.py": "torchrun",
    "python -m torch.distributed.run launcher/run.py": "torch.distributed.run",
    "python launcher/run.py deepspeed": "run.py",
    "python -c torchrun": "",
    "python": "",
    "bash deepspeed": "",
    "timeout deepspeed": "",
    "": "",
}


@pytest.mark.parametrize("words", PROGRAMS)
def test_a_command_line_tells_what_python_runs(words):
    assert program_of(words.split()) == PROGRAMS[words]


# Tells whom it descends from, then who of them is gone, as soon as one is.
LEAF = """
import json, os, sys, time
sys.path[:0] = {path}
from cpt_launcher.launchers import find_launchers
launchers = find_launchers({{}})
def tell(name, what):
    open(name + ".aside", "w").write(json.dumps(what)); os.rename(name + ".aside", name)
tell("found", [[launcher.pid, launcher.name] for launcher in launchers.found])
while not (reason := launchers.why_gone()):
    time.sleep(0.01)
tell("gone", reason)
"""
# Starts what its command line says and waits, as launchers do.
STARTER = "import subprocess, sys\nsubprocess.Popen(sys.argv[1:]).wait()\n"


@pytest.fixture
def started(tmp_path):
    """Start a leaf below the processes that `words` begin; told whom it found. Ends all of them."""
    for name in ("deepspeed", "torchrun", "deepspeed.py", "deepspeed/launcher/launch.py"):
        folder = tmp_path / ("modules" if name.endswith(".py") else "bin")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STARTER)
    path = [str(runs.ROOT), str(runs.ROOT / "launcher"), str(runs.ROOT / "kernels")]
    (tmp_path / "leaf.py").write_text(LEAF.format(path=path))
    processes = []

    def start(*words: str) -> tuple[subprocess.Popen, list[list]]:
        python = [sys.executable]
        # A runner starts launch as a module, found on the path; each of the others is a file.
        steps = {"deepspeed": [*python, "bin/deepspeed"], "torchrun": [*python, "bin/torchrun"],
                 "launch": [*python, "-u", "-m", "deepspeed.launcher.launch"], "sh": ["sh", "-c", '"$@"; true', "sh"],
                 "other": [*python, "modules/deepspeed.py"]}  # fmt: skip
        command = [word for name in words for word in steps[name]] + [*python, "leaf.py", "deepspeed", "torchrun"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "modules"}, start_new_session=True
        )
        processes.append(process)
        runs.wait_for((tmp_path / "found").exists, "the leaf to look for its launchers")
        return process, json.loads((tmp_path / "found").read_text())

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(folder: Path) -> str:
    runs.wait_for((folder / "gone").exists, "the leaf to miss a launcher", 10)
    return json.loads((folder / "gone").read_text())


def test_deepspeeds_two_processes_are_found_and_the_runner_is_missed(started, tmp_path):
    runner, found = started("deepspeed", "launch")
    assert [name for _, name in found] == ["deepspeed.launcher.launch", "deepspeed"] and found[1][0] == runner.pid
    runner.kill()  # and nobody waits for it, as under a shell that is busy
    assert told(tmp_path) == f"the launcher (process {runner.pid}, deepspeed) is gone"


def test_deepspeeds_launch_is_missed(started, tmp_path):
    _, found = started("sh", "deepspeed", "launch", "sh")
    assert [name for _, name in found] == ["deepspeed.launcher.launch", "deepspeed"]
    os.kill(found[0][0], signal.SIGKILL)
    assert told(tmp_path) == f"the launcher (process {found[0][0]}, deepspeed.launcher.launch) is gone"


def test_torchruns_agent_is_missed_at_sigterm_too(started, tmp_path):
    agent, found = started("torchrun")
    assert found == [[agent.pid, "torchrun"]]
    agent.terminate()
    agent.wait()
    assert told(tmp_path) == f"the launcher (process {agent.pid}, torchrun) is gone"


@pytest.mark.parametrize("words", [["sh"], ["other"], []])
def test_shells_and_other_programs_are_no_launchers(started, words):
    assert started(*words)[1] == []


def test_a_number_that_was_given_to_another_process_is_not_taken_for_the_launcher():
    own = launchers._state_parent_start(os.getpid())[2]
    assert not Launcher(os.getpid(), "torchrun", own).is_gone()
    assert Launcher(os.getpid(), "torchrun", str(int(own) - 1)).is_gone()


def test_a_look_that_fails_for_another_reason_ends_no_run(monkeypatch):
    def fail(pid):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(launchers, "_state_parent_start", fail)
    assert Launchers([Launcher(os.getpid(), "torchrun", "1")]).why_gone() is None


def test_without_proc_the_parent_is_looked_at_if_a_launcher_set_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(launchers, "PROC", tmp_path)
    assert find_launchers({"RANK": "0"}).found == ()
    watched = find_launchers({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"})
    assert watched.found == [Launcher(os.getppid(), "torchrun", None)] and watched.why_gone() is None
    assert find_launchers({"CROSS_RANK": "0"}).found[0].name == "deepspeed.launcher.launch"
    monkeypatch.setattr(launchers.os, "getppid", lambda: 1)
    assert watched.why_gone() == f"the launcher (process {watched.found[0].pid}, torchrun) is gone"
