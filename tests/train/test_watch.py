"""A rank that is gone or hangs ends all, soon, with one message that names it and with the stacks of all others."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cpt_harness import faults, runs
from cpt_harness.ranks import in_processes

from cpt.parallel.watch import Settings, Watch

HERE = socket.gethostname()


@pytest.fixture
def config(data, tmp_path) -> Path:
    batch = {"windows": 12, "micro_batch": 2}  # for up to three ranks
    stage = runs.stage(data, "prose", 4000)
    plain = runs.settings(data, tmp_path / "run", [stage], batch=batch, watch=faults.WATCH)
    return runs.write_settings(tmp_path / "run.yaml", plain)


def messages(ranks: faults.Ranks) -> list[str]:
    """The lines by which all ranks together say on their terminals why they end."""
    told = [ranks.told(rank) for rank in range(len(ranks.pids))]
    assert not [text for text in told if "Traceback" in text]
    return [line for text in told for line in text.splitlines() if line.startswith("cpt train: ")]


def holds_stacks(path: Path) -> bool:
    # A signal may come to a thread of C's, and then there is no "Current thread".
    return "most recent call first" in path.read_text()


def stacks(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "logs").glob("stacks-*") if holds_stacks(path))


def stacks_of(*some: int) -> list[str]:
    return [f"stacks-rank-{rank:05d}.txt" for rank in some]


@pytest.mark.parametrize("lost", [1, 0])
def test_a_rank_that_was_stopped_is_named_and_the_others_end(config, tmp_path, lost):
    run, others = tmp_path / "run", [rank for rank in range(3) if rank != lost]
    with faults.started(config, number=3, folder=tmp_path) as ranks:
        ranks.wait_for_step(run, 5)
        ranks.send(lost, signal.SIGSTOP)
        assert ranks.wait(*others) == [1, 1]
        (line,) = messages(ranks)
        assert line.startswith(f"cpt train: rank {lost} on {HERE} is gone: no sign of life for ")
        assert stacks(run) == stacks_of(*others)
        ended = faults.last_end(run)
        assert (ended["how"], ended["rank"], ended["node"]) == ("failed", lost, HERE)
        assert ended["reason"] in line and not ended.get("is_final")


def test_it_is_told_once_though_the_first_rank_is_slow_to_note_it(config, tmp_path):
    def before(rank: int) -> None:
        from cpt.observe import attempts

        really = attempts.note_end
        attempts.note_end = lambda *words, **fields: (time.sleep(2 * (rank == 0)), really(*words, **fields))[1]

    with faults.started(config, number=3, folder=tmp_path, before=before) as ranks:
        ranks.wait_for_step(tmp_path / "run", 5)
        ranks.send(1, signal.SIGSTOP)
        assert ranks.wait(0, 2) == [1, 1]
        (line,) = messages(ranks)
        assert line.startswith(f"cpt train: rank 1 on {HERE} is gone: ")


@pytest.mark.parametrize("lost", [2, 0])
def test_a_rank_that_was_killed_is_named_and_no_other_has_a_traceback(config, tmp_path, lost):
    run, others = tmp_path / "run", [rank for rank in range(3) if rank != lost]
    with faults.started(config, number=3, folder=tmp_path) as ranks:
        ranks.wait_for_step(run, 5)
        ranks.send(lost, signal.SIGKILL)
        time.sleep(0.5)
        ranks.send(others[0], signal.SIGTERM)  # as launchers do when they see that one has ended
        assert ranks.wait(*others) == [1, 1]
        (line,) = messages(ranks)
        assert f"rank {lost} on {HERE} is gone" in line and "connections to it broke" in line
        ended = faults.last_end(run)
        assert (ended["rank"], ended["node"]) == (lost, HERE)


def test_a_rank_that_hangs_in_loading_data_is_told_from_those_that_wait_for_it(config, tmp_path):
    def before(rank: int) -> None:
        if rank == 1:
            faults.at_step(4, faults.sleep_for_ever)

    with faults.started(config, number=2, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [1, 1]
        (line,) = messages(ranks)
    assert f"rank 1 on {HERE} is behind, loading data for step 4; the others wait, computing for step 4" in line
    assert "none of 2 ranks has got any further for" in line and "watch.hang_seconds = 6" in line
    assert stacks(tmp_path / "run") == stacks_of(0, 1)
    assert "sleep_for_ever" in (tmp_path / "run" / "logs" / "stacks-rank-00001.txt").read_text()
    assert (faults.last_end(tmp_path / "run")["rank"], faults.last_end(tmp_path / "run")["step"]) == (1, 3)


def test_a_collective_that_never_ends_is_told_as_one_in_which_all_wait(config, tmp_path):
    def before(rank: int) -> None:
        from cpt.observe.signals import StopRequest

        really, left = StopRequest.is_asked, [4]

        def is_asked(request) -> bool:
            left[0] -= 1
            if left[0] == 0:
                faults.sleep_for_ever()
            return really(request)

        StopRequest.is_asked = is_asked

    with faults.started(config, number=2, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [1, 1]
        (line,) = messages(ranks)
    assert "all are at the same place, loading data for step 4" in line
    assert stacks(tmp_path / "run") == stacks_of(0, 1)
    assert faults.last_end(tmp_path / "run")["rank"] is None


def test_a_rank_that_keeps_pythons_lock_is_missed_by_the_others_and_ends_itself(config, tmp_path):
    def hold_the_lock() -> None:
        ctypes.PyDLL(None).sleep(1000)

    def before(rank: int) -> None:
        if rank == 1:
            faults.at_step(4, hold_the_lock)

    with faults.started(config, number=2, folder=tmp_path, before=before) as ranks:
        assert ranks.wait(0) == [1]
        (line,) = messages(ranks)
        assert f"rank 1 on {HERE} is gone: no sign of life for" in line
        assert ranks.wait(1) == [1]  # though nobody could call anything in it
    assert "hold_the_lock" in (tmp_path / "run" / "logs" / "stacks-rank-00001.txt").read_text()


def test_a_run_of_one_process_that_hangs_ends_too(config, tmp_path):
    def before(rank: int) -> None:
        faults.at_step(4, faults.sleep_for_ever)

    with faults.started(config, number=1, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [1]
        (line,) = messages(ranks)
    assert "nothing has got any further for" in line and "loading data for step 4" in line
    assert stacks(tmp_path / "run") == stacks_of(0)
    assert faults.last_end(tmp_path / "run")["reason"] in line


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_tells_it_itself_and_the_others_add_nothing(config, tmp_path, failing):
    def fail() -> None:
        raise RuntimeError("out of something")

    def before(rank: int) -> None:
        if rank == failing:
            faults.at_step(4, fail)

    with faults.started(config, number=2, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [1, 1]
        told = [ranks.told(rank) for rank in range(2)]
    assert told[failing].rstrip().endswith("RuntimeError: out of something")
    assert "Traceback" not in told[1 - failing] and "gone" not in told[1 - failing]
    log = (tmp_path / "run" / "logs" / f"rank-{1 - failing:05d}.log").read_text()
    assert f"rank {failing} on {HERE} failed: RuntimeError: out of something" in log
    ended = faults.last_end(tmp_path / "run")
    assert (ended["rank"], ended["reason"]) == (failing, "RuntimeError: out of something")


def test_slow_saves_are_no_hang(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 6)], watch=faults.WATCH)

    def before(rank: int) -> None:
        from cpt.checkpoint.write import Part

        really = Part.write

        def write(*arguments):
            if rank == 1:
                time.sleep(8)
            return really(*arguments)

        Part.write = write

    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with faults.started(config, number=2, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [0, 0]
    assert faults.last_end(tmp_path / "run")["how"] == "finished"


def test_a_stopped_job_that_goes_on_together_is_not_ended(config, tmp_path):
    run = tmp_path / "run"
    with faults.started(config, number=2, folder=tmp_path) as ranks:
        ranks.wait_for_step(run, 5)
        for rank in range(2):
            ranks.send(rank, signal.SIGSTOP)
        time.sleep(8)
        steps = runs.num_lines(run / "metrics.jsonl")
        for rank in range(2):
            ranks.send(rank, signal.SIGCONT)
        ranks.wait_for_step(run, steps + 20)
        assert [ranks.status(rank) for rank in range(2)] == [None, None]


@pytest.mark.parametrize("words", [(), ("watch.hang_seconds=null",)])
def test_anybody_can_ask_a_rank_for_its_stacks(config, tmp_path, words):
    with faults.started(config, *words, number=1, folder=tmp_path) as ranks:
        ranks.wait_for_step(tmp_path / "run", 3)
        os.kill(ranks.pids[0], signal.SIGUSR2)
        runs.wait_for(lambda: stacks(tmp_path / "run") == stacks_of(0), "the stacks")
        steps = runs.num_lines(tmp_path / "run" / "metrics.jsonl")
        ranks.wait_for_step(tmp_path / "run", steps + 3)


def test_a_process_that_imports_tells_its_stacks_on_its_terminal_and_goes_on(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 2)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    told = tmp_path / "told"
    with told.open("w") as terminal:
        run = subprocess.Popen([sys.executable, runs.ROOT / "launcher" / "run.py", config], stderr=terminal)
    try:
        runs.wait_for(lambda: catches_usr2(run.pid), "the handler")
        run.send_signal(signal.SIGUSR2)
        runs.wait_for(lambda: holds_stacks(told), "stacks")
        assert not (tmp_path / "run").exists()
        assert run.wait(4 * runs.SECONDS) == 0, told.read_text()
    finally:
        run.kill()
        run.wait()


def catches_usr2(pid: int) -> bool:
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def test_a_rank_that_watches_no_more_tells_its_stacks_on_its_terminal(tmp_path):
    def work() -> list[list[bool]]:
        (tmp_path / "logs").mkdir()
        terminal = os.open(tmp_path / "told", os.O_WRONLY | os.O_CREAT)
        os.dup2(terminal, 2)
        watch = Watch(Settings())
        watch.open()
        watch.keep_in(tmp_path)
        places = tmp_path / "logs" / "stacks-rank-00000.txt", tmp_path / "told"
        os.kill(os.getpid(), signal.SIGUSR2)
        runs.wait_for(lambda: holds_stacks(places[0]) or holds_stacks(places[1]), "stacks")
        before = [holds_stacks(path) for path in places]
        watch.close()
        os.kill(os.getpid(), signal.SIGUSR2)
        runs.wait_for(lambda: holds_stacks(places[1]), "stacks on the terminal")
        return before

    assert in_processes([work]) == [[True, False]]


def test_an_undisturbed_run_leaves_no_stacks(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 4)], watch=faults.WATCH)
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with faults.started(config, number=2, folder=tmp_path) as ranks:
        assert ranks.wait() == [0, 0]
        assert messages(ranks) == []
    assert not list((tmp_path / "run" / "logs").glob("stacks-*"))
