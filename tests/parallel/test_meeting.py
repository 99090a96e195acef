"""Ranks that do not come are named; a port that is taken and a name that nobody knows are told."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from cpt_harness import runs
from cpt_harness.ranks import in_processes

from cpt.config import Fault
from cpt.observe.logs import log_to_terminal
from cpt.parallel import meeting
from cpt_launcher.rendezvous import pick_free_port


def fault_of(
    rank: int,
    size: int,
    port: int,
    seconds: float,
    after: float = 0.0,
    start: str = "",
    until: tuple[Path, ...] = (),
    met: Path | None = None,
) -> str:
    """What a rank says that cannot meet the others; "" if it can, and then goes on until these files are there."""
    time.sleep(after)
    log_to_terminal(rank)
    try:
        store = meeting.open_store(
            "127.0.0.1", port, rank, size, is_on_one_machine=True, is_kept_by_agent=False, seconds=seconds, start=start
        )
    except Fault as fault:
        assert fault.is_passing
        return str(fault)
    if met:
        met.touch()
    runs.wait_for(lambda: all(path.exists() for path in until), "the others")
    store.set(f"done/{rank}", "")
    if rank == 0:  # the store ends with it
        store.wait([f"done/{other}" for other in range(size)])
    return ""


def test_the_first_rank_names_those_that_do_not_come_and_the_others_do_not_wait_longer():
    port = pick_free_port()
    first, other = in_processes([lambda: fault_of(0, 4, port, 3), lambda: fault_of(2, 4, port, 3)])
    assert first.startswith("ranks 1 and 3 of 4 did not come within 3 s (mesh.timeout_seconds); see whether they were ")
    assert other == f"{first}; rank 0 says so too"


def test_the_first_rank_says_for_whom_it_waits(monkeypatch, capfd):
    monkeypatch.setattr(meeting, "_TELL_SECONDS", 0.5)
    port = pick_free_port()
    assert in_processes([lambda: fault_of(0, 2, port, 30), lambda: fault_of(1, 2, port, 30, after=2)]) == ["", ""]
    assert "rank 0 waits for rank 1 of 2, since" in capfd.readouterr().err


def test_a_port_that_is_taken_is_told_with_the_ways_to_name_another(monkeypatch):
    monkeypatch.setattr(meeting, "_LOOKING_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=rf"port {port} on 127.0.0.1 is taken by another program; name a free port: "):
            meeting.open_store("127.0.0.1", port, 0, 2, is_on_one_machine=True, is_kept_by_agent=False, seconds=3)


@pytest.mark.parametrize("second", ["a job with output = b", "a job with output = a"])
def test_a_second_run_at_the_same_port_joins_nobody_and_says_whom_it_found(tmp_path, second):
    port, first = pick_free_port(), "a job with output = a"
    met, ended = ([tmp_path / f"{what}-{rank}" for rank in range(2)] for what in ("met", "ended"))

    def of_first(rank: int) -> str:
        return fault_of(rank, 2, port, 30, start=first, until=tuple(ended), met=met[rank])

    def of_second(rank: int) -> str:
        runs.wait_for(lambda: all(path.exists() for path in met), "the first run")
        told = fault_of(rank, 2, port, 30, start=second)
        ended[rank].touch()
        return told

    works = [lambda rank=rank: of_first(rank) for rank in range(2)] + [
        lambda rank=rank: of_second(rank) for rank in (0, 1)
    ]
    *well, taken, stranger = in_processes(works, seconds=90)
    assert well == ["", ""]
    assert taken.startswith(f"port {port} on 127.0.0.1 is taken by {first}; name a free port: ")
    assert f" at 127.0.0.1:{port}" in stranger and stranger.startswith("rank 1, process ")
    told = f"belongs to {second}, and finds {first}" if second != first else "which has come as rank 1 before"
    assert told in stranger


def test_a_program_at_the_port_that_does_not_answer_holds_up_nobody_for_ever(monkeypatch):
    monkeypatch.setattr(meeting, "_LOOKING_SECONDS", 1.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        (told,) = in_processes([lambda: fault_of(1, 2, port, 1)])
    assert f"finds at 127.0.0.1:{port} a program that is none of ours and does not answer; name a free port: " in told


def test_an_address_that_nobody_knows_is_told():
    with pytest.raises(Fault, match=r"rank 0 cannot find the address no\.such\.machine\.invalid \(MASTER_ADDR\)"):
        meeting.open_store(
            "no.such.machine.invalid", 1, 0, 2, is_on_one_machine=True, is_kept_by_agent=False, seconds=3
        )


def test_numbers_of_ranks_are_told_as_a_person_would():
    assert meeting.told_numbers([3]) == "rank 3"
    assert meeting.told_numbers([3, 5, 6]) == "ranks 3, 5 and 6"
    assert meeting.told_numbers(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
