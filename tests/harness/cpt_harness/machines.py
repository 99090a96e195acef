"""Machines that are namespaces of this one: a network, host names, processes and shared memory of their own.

    the first one --+-- bridge --+-- machine 1      files are everybody's, as on a cluster
                    |            +-- machine 2

The first process of a machine takes all others with it when it dies, which is how a machine is switched off; it dies
with this process, too. Nothing outside is changed, and two sets of machines do not meet.

Needs root, and util-linux and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare", "setpriv")
NETWORK = "10.77.0"  # of no one's concern outside: the bridge lies in the first machine's namespace
# Its parent's death kills it, and with it all processes of the namespace.
NAMESPACE = "setpriv --pdeathsig KILL unshare --net --mount --uts --ipc --pid --fork --kill-child=KILL --mount-proc"
# The first process of a node gives orphans their rest (`wait`) and ends never.
FIRST_PROCESS = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf &&
mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo up || exit 1
exec >/dev/null
while :; do sleep 3600 & wait $!; done
"""


def why_not() -> str | None:
    """Why there can be no machines here, in a line; None if there can."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "only root can make the namespaces that stand for machines"
    tried = subprocess.run([*NAMESPACE.split(), "true"], capture_output=True, text=True)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


class Machines:
    """Machines of these names, none of which is on yet; the first one has to be on as long as any other is.

    `home` is a folder for their files, gone after `close`; its name is short, for those of sockets have 108 bytes at
    most, and all users may enter it. `addresses`: of each name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.addresses = {name: f"{NETWORK}.{number + 1}" for number, name in enumerate(names)}
        self.home = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.home.chmod(0o755)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.home / "hosts").write_text("\n".join(lines) + "\n")
        # No name server is asked.
        (self.home / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self._switch = names[0]
        self._unshares: dict[str, subprocess.Popen] = {}  # each is the parent of a machine's first process

    def close(self) -> None:
        """Everything on all of them is killed."""
        for name in list(self._unshares):
            self.switch_off(name)
        shutil.rmtree(self.home)

    def is_on(self, name: str) -> bool:
        return name in self._unshares

    def switch_on(self, name: str) -> None:
        """A machine with nothing but its first process; what ran there is gone."""
        if self.is_on(name):
            self.switch_off(name)
        words = [*NAMESPACE.split(), "sh", "-c", FIRST_PROCESS, "sh", name, str(self.home)]
        first = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._unshares[name] = first
        assert first.stdout.readline() == "up\n", f"{name} cannot be made"
        if name == self._switch:
            self._ip(name, "link", "add", "bridge", "type", "bridge")
            self._ip(name, "addr", "add", f"{self.addresses[name]}/24", "dev", "bridge")
            self._ip(name, "link", "set", "bridge", "up")
            return
        port = self._port(name)
        peer = ("peer", "name", "eth0", "netns", self._first(name))
        if self._has_port(name):  # for as long as connections of the machine that died wait for answers
            self._ip(self._switch, "link", "delete", port)
        self._ip(self._switch, "link", "add", port, "type", "veth", *peer)
        self._ip(self._switch, "link", "set", port, "master", "bridge", "up")
        self._ip(name, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")

    def switch_off(self, name: str) -> None:
        """All its processes die at once; the machine's network says so to whoever is connected."""
        unshare = self._unshares.pop(name)
        with contextlib.suppress(StopIteration, ProcessLookupError):
            os.kill(next(children_of(unshare.pid)), signal.SIGKILL)
        unshare.kill()
        unshare.wait()
        unshare.stdout.close()

    def cut(self, name: str) -> None:
        """Nothing comes or goes over its network, as when a switch dies; its processes live on."""
        self._ip(self._switch, "link", "set", self._port(name), "nomaster")

    def heal(self, name: str) -> None:
        """The network of a machine works, whether it was cut off or not."""
        self._ip(self._switch, "link", "set", self._port(name), "master", "bridge")

    def processes(self, name: str, *words: str) -> list[int]:
        """A machine's processes, as this process numbers them; those whose first three words have all of these in them.

        Programs that are named further on do not count: what srun or a supervisor is to start.
        """
        namespace = os.readlink(f"/proc/{self._first(name)}/ns/pid")
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    line = Path(f"/proc/{entry}/cmdline").read_text(errors="replace").split("\0")[:3]
                    if line[0] and all(word in " ".join(line) for word in words):
                        found.append(int(entry))
        return sorted(found)

    def signal(self, name: str, number: signal.Signals, *words: str) -> list[int]:
        """Send a signal to the processes of a machine with these words, and say which they are; fails if none is."""
        found = self.processes(name, *words)
        assert found, f"no process {words} on {name}"
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return found

    def enter(self, name: str, folder: Path | None = None) -> list[str]:
        """The words before a command that is to run there."""
        place = f"--wd={folder or self.home}"
        return ["nsenter", "-t", str(self._first(name)), "--mount", "--uts", "--ipc", "--net", "--pid", place, "--"]

    def _first(self, name: str) -> int:
        return next(children_of(self._unshares[name].pid))

    def _ip(self, name: str, *words: object) -> None:
        command = ["nsenter", "-t", str(self._first(name)), "--net", "ip", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _port(self, name: str) -> str:
        return f"to-{name}"

    def _has_port(self, name: str) -> bool:
        command = ["nsenter", "-t", str(self._first(self._switch)), "--net", "ip", "link", "show", self._port(name)]
        return subprocess.run(command, capture_output=True).returncode == 0


def children_of(process: int) -> Iterator[int]:
    """The processes that a process with one thread has started."""
    try:
        yield from map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    except FileNotFoundError:
        return
