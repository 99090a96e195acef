"""Who is not on the job's own network finds no open port of a run."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

import pytest
from cpt_harness import faults, runs
from cpt_harness.ranks import on_ranks

from cpt.parallel import meeting

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's tables of sockets")
_LISTENING = "0A"


def listeners(pid: int) -> set[str]:
    """The addresses at which a process listens, `0.0.0.0` for all of IPv4 and `::` for all there are."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(handle))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in inodes:
                found.add(address_of(fields[1].partition(":")[0]))
    return found


def address_of(hexadecimal: str) -> str:
    """An address as the kernel shows it: words of four bytes in the machine's order."""
    words = [int(hexadecimal[at : at + 8], 16) for at in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    return str(getattr(address, "ipv4_mapped", None) or address)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_on_loopback_listens_nowhere_else(data, tmp_path, number):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 4000)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with faults.started(config, number=number, folder=tmp_path) as ranks:
        ranks.wait_for_step(tmp_path / "run", 2)
        found = {address for pid in ranks.pids for address in listeners(pid)}
    assert all(ipaddress.ip_address(address).is_loopback for address in found), found
    assert found or number == 1


def test_the_table_of_sockets_shows_one_that_listens_everywhere():
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        assert "0.0.0.0" in listeners(os.getpid())


def test_a_name_that_only_this_machine_knows_as_itself_is_listened_for_at_all_addresses(caplog):
    with caplog.at_level("INFO"), meeting._listen("127.0.0.1", 0, is_on_one_machine=False) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"
    (line,) = caplog.messages
    assert line == "127.0.0.1 is 127.0.0.1 here, where other machines find nobody: listening at all addresses"


def test_an_address_that_is_not_this_machines_own_is_listened_for_at_all(caplog):
    with caplog.at_level("INFO"), meeting._listen("192.0.2.7", 0, is_on_one_machine=False) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"
    assert caplog.messages == ["192.0.2.7 is no address of this machine's own: listening at all addresses"]


def test_gloo_takes_the_interface_towards_the_first_rank_unless_the_user_names_one(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert on_ranks(2, lambda mesh: os.environ["GLOO_SOCKET_IFNAME"]) == ["lo", "lo"]
    first = next(name for _, name in socket.if_nameindex())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", first)
    assert on_ranks(1, lambda mesh: os.environ["GLOO_SOCKET_IFNAME"]) == [first]
