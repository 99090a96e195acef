"""Where the ranks meet: a store that the first rank keeps, listening at the job's own address and nowhere else.

    first rank    binds address:port  -->  store  <--  the others connect, and say that they are there
                  "waits for ranks 3 and 5" every minute, until all are there or time is up

Before a rank says anything it looks whose store it has found: another run may have come to the port first.

Under torchrun the store is its agent's, and listens where that pleases. A process by itself needs no socket.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import ipaddress
import logging
import os
import socket
import struct
import threading
import time

import torch.distributed as dist

from cpt.config import Fault

_log = logging.getLogger(__name__)

_TELL_SECONDS = 60.0
_HEARING_SECONDS = 10.0
_LOOKING_SECONDS = 5.0  # at who has taken the port
_WAITING_CONNECTIONS = 4096
_OURS = "cpt's run"  # where the first rank says which start this is


def open_store(
    address: str, port: int, rank: int, size: int, *, is_on_one_machine: bool, is_kept_by_agent: bool, seconds: float,
    start: str = "",
) -> dist.Store:  # fmt: skip
    """The store at which `size` ranks meet, when all of them are there.

    `start` tells this start from others, and all its ranks know it without talking. Raises a passing Fault if the port
    is taken, the first rank cannot be reached or is another start's, or some do not come within `seconds`.
    """
    if size == 1:
        return dist.HashStore()
    listening = None
    if rank == 0 and not is_kept_by_agent:
        listening = _listen(address, port, is_on_one_machine)
    try:
        store = _connected(address, port, size, seconds, listening)
        if store is None:
            raise Fault(
                f"rank {rank} on {socket.gethostname()} finds at {address}:{port} a program that is none of ours and "
                f"does not answer; {_OTHER_PORT}",
                is_passing=True,
            )
        _refuse_strangers(store, f"{address}:{port}", rank, start, is_kept_by_agent)
        _gather(store, rank, size, seconds)
    except dist.DistError as error:
        raise Fault(
            f"rank {rank} on {socket.gethostname()} could not meet the others at {address}:{port}: "
            f"{str(error).splitlines()[0]}",
            is_passing=True,
        ) from None
    return store


_OTHER_PORT = "name a free port: deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N"


def _connected(
    address: str, port: int, size: int, seconds: float, listening: socket.socket | None = None
) -> dist.Store | None:
    """The store at this address, of which this process is the keeper if it listens; None if nobody answers there."""
    found: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            handle = None if listening is None else listening.detach()
            found.append(
                dist.TCPStore(
                    address, port, size, is_master=handle is not None, timeout=datetime.timedelta(seconds=seconds),
                    wait_for_workers=False, master_listen_fd=handle,
                )
            )  # fmt: skip
        except Exception as error:  # handed over to who asked
            found.append(error)

    # torch waits for ever for a program that accepts and does not answer, whatever the time-out.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(seconds + _LOOKING_SECONDS)
    if found and isinstance(found[0], Exception):
        raise found[0]
    return found[0] if found else None


def _refuse_strangers(store: dist.Store, place: str, rank: int, start: str, is_kept_by_agent: bool) -> None:
    """Raise a passing Fault if this store is another start's, or another process has come as this rank."""
    here = f"process {os.getpid()} on {socket.gethostname()}"
    # The others wait until the first rank has said it.
    theirs = (store.compare_set(_OURS, "", start) if rank == 0 else store.get(_OURS)).decode()
    if theirs != start:
        raise Fault(
            f"rank {rank}, {here}, belongs to {start or 'a run'}, and finds {theirs or 'another run'} at {place}; "
            f"{_OTHER_PORT}",
            is_passing=True,
        )
    if is_kept_by_agent:  # it may serve several starts one after another
        store.set(f"here/{rank}", here)
        return
    if (other := store.compare_set(f"here/{rank}", "", here).decode()) != here:
        raise Fault(
            f"rank {rank}, {here}, finds {other} at {place}, which has come as rank {rank} before: another start of "
            f"the same run meets there; {_OTHER_PORT}",
            is_passing=True,
        )


def _who_is_at(address: str, port: int) -> str:
    """Which start has taken this port, as a few words; `another program` if it does not say."""
    try:
        store = _connected(address, port, 2, _LOOKING_SECONDS)
        return store.get(_OURS).decode() or "another run" if store is not None else "another program"
    except (dist.DistError, ValueError):
        return "another program"


def _listen(address: str, port: int, is_on_one_machine: bool) -> socket.socket:
    """A socket that listens at the address alone; at all of this machine's where others would not find it there."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        told = f"rank 0 cannot find the address {address} (MASTER_ADDR): {error.strerror}"
        raise Fault(told, is_passing=True) from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    anywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    # Debian's /etc/hosts gives a machine's own name an address that only it knows.
    is_hidden = ipaddress.ip_address(place[0].partition("%")[0]).is_loopback and not is_on_one_machine
    if is_hidden:
        _log.info("%s is %s here, where other machines find nobody: listening at all addresses", address, place[0])
        place = (anywhere, *place[1:])
    try:
        _bind(listening, place, anywhere, address)
        listening.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise Fault(f"rank 0 cannot listen at {address}:{port}: {error.strerror}", is_passing=True) from None
        who = _who_is_at(address, port)
        raise Fault(f"port {port} on {address} is taken by {who}; {_OTHER_PORT}", is_passing=True) from None
    return listening


def _bind(listening: socket.socket, place: tuple, anywhere: str, address: str) -> None:
    try:
        listening.bind(place)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        _log.info("%s is no address of this machine's own: listening at all addresses", address)
        listening.bind((anywhere, *place[1:]))


def _gather(store: dist.Store, rank: int, size: int, seconds: float) -> None:
    """Return when every rank has come; the first one says for whom it waits. Raises Fault when time is up."""
    if rank > 0:
        store.wait(["all here"], datetime.timedelta(seconds=seconds + _TELL_SECONDS))
        reason = store.get("all here").decode()
        store.add("heard", 1)
        if reason:
            raise Fault(f"{reason}; rank 0 says so too", is_passing=True)
        return
    began, told = time.monotonic(), time.monotonic()
    missing = list(range(size))
    while missing := [one for one in missing if not store.check([f"here/{one}"])]:
        waited = time.monotonic() - began
        if waited > seconds:
            reason = (
                f"{told_numbers(missing)} of {size} did not come within {seconds:g} s (mesh.timeout_seconds); "
                f"see whether they were started, and whether their machines reach {socket.gethostname()}"
            )
            _end_with(store, reason, size - 1 - len(missing))
            raise Fault(reason, is_passing=True)
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            _log.warning("rank 0 waits for %s of %d, since %.0f s", told_numbers(missing), size, waited)
        time.sleep(0.05)
    store.set("all here", "")


def _end_with(store: dist.Store, reason: str, num_others: int) -> None:
    """Let those that came hear why it ends: the store ends with this process."""
    store.set("all here", reason)
    deadline = time.monotonic() + _HEARING_SECONDS
    while store.add("heard", 0) < num_others and time.monotonic() < deadline:
        time.sleep(0.05)


def told_numbers(ranks: list[int]) -> str:
    """`rank 3`, `ranks 3, 5 and 6`; of many the first eight and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown, more = (ranks, 0) if len(ranks) <= 8 else (ranks[:8], len(ranks) - 8)
    if more:
        return f"ranks {', '.join(map(str, shown))} and {more} more"
    return f"ranks {', '.join(map(str, shown[:-1]))} and {shown[-1]}"


def interface_towards(address: str, port: int) -> str | None:
    """The network interface by which this machine reaches an address; None if that cannot be told."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    if family != socket.AF_INET:
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None) or (
        "lo" if own.startswith("127.") else None
    )


def _address_of(interface: str) -> str | None:
    """An interface's IPv4 address, if it has one."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
