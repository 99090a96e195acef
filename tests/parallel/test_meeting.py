"""Ranks that do not come are named; a port that is taken and a name that nobody knows are told."""

from __future__ import annotations

import socket
import time

import pytest
from cpt_harness.ranks import in_processes

from cpt.config import Fault
from cpt.observe.logs import log_to_terminal
from cpt.parallel import meeting
from cpt_launcher.rendezvous import pick_free_port


def fault_of(rank: int, size: int, port: int, seconds: float, after: float = 0.0) -> str:
    """What a rank says that cannot meet the others; "" if it can."""
    time.sleep(after)
    log_to_terminal(rank)
    try:
        store = meeting.open_store(
            "127.0.0.1", port, rank, size, is_on_one_machine=True, is_kept_by_agent=False, seconds=seconds
        )
    except Fault as fault:
        return str(fault)
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


def test_a_port_that_is_taken_is_told_with_the_ways_to_name_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=rf"port {port} on 127.0.0.1 is taken by another program; name a free one: "):
            meeting.open_store("127.0.0.1", port, 0, 2, is_on_one_machine=True, is_kept_by_agent=False, seconds=3)


def test_an_address_that_nobody_knows_is_told():
    with pytest.raises(Fault, match=r"rank 0 cannot find the address no\.such\.machine\.invalid \(MASTER_ADDR\)"):
        meeting.open_store(
            "no.such.machine.invalid", 1, 0, 2, is_on_one_machine=True, is_kept_by_agent=False, seconds=3
        )


def test_numbers_of_ranks_are_told_as_a_person_would():
    assert meeting.told_numbers([3]) == "rank 3"
    assert meeting.told_numbers([3, 5, 6]) == "ranks 3, 5 and 6"
    assert meeting.told_numbers(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
