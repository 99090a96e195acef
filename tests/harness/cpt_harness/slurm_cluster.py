"""A throw-away SLURM on one machine: a real slurmctld and slurmd of the distribution, a namespace for each node.

    with SlurmCluster(folder, nodes=3) as cluster:
        cluster.run("srun", "-N2", "hostname")

    login: munged, slurmctld --+-- bridge --+-- node 1: slurmd --> slurmstepd --> tasks
                               |            +-- node 2: ...

A node has its own network, host name, processes and shared memory; files are everybody's, as on a cluster. The first
process of a node takes all others with it when it dies, which is how a node is switched off and how everything is
stopped at the end. It dies with this process, too. Networks and names meet those of no other cluster.

Needs root, namespaces, and Debian's slurm-wlm (tried: 22.05), munge and iproute2; `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpt_harness.runs import wait_for

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "nsenter", "unshare", "setpriv")
PACKAGES = "slurm-wlm munge iproute2"
FREEZER = Path("/sys/fs/cgroup/freezer")
NETWORK = "10.77.0"  # of no one's concern outside: the bridge lies in the login node's namespace
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
SECONDS = 120.0

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
    """What this machine lacks for a cluster, in a line; None if nothing."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(missing)} here: apt-get install --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "only root can make the namespaces that stand for nodes"
    tried = subprocess.run([*NAMESPACE.split(), "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"no namespaces can be made here: {tried.stderr.strip()}"
    return None


class SlurmCluster:
    """A cluster that is up inside `with`; `folder` gets its logs.

    `nodes` and `login` are host names. Partitions: `low` (the default one; preempted with a grace time, requeued) and
    `high`. Seconds: `slurmd_timeout` until a silent node counts as down (plus up to 20), `kill_wait` between SIGTERM
    and SIGKILL, `grace` for a job that is preempted, `requeue_wait` before a requeued job starts again.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        cpus: int = 4,
        memory_mb: int = 6000,
        slurmd_timeout: int = 15,
        kill_wait: int = 30,
        grace: int = 20,
        requeue_wait: int = 5,
        extra: Sequence[str] = (),
    ) -> None:
        name = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
        self.login = f"{name}-login"
        self.nodes = [f"{name}-{number}" for number in range(1, nodes + 1)]
        self.logs = folder / "slurm-logs"
        self.requeue_wait = requeue_wait
        self.is_cgroup = FREEZER.is_dir()  # without it what a task leaves behind outlives its job
        self._settings = {
            "cpus": cpus, "memory_mb": memory_mb, "slurmd_timeout": slurmd_timeout, "kill_wait": kill_wait,
            "grace": grace, "requeue_wait": requeue_wait,
        }  # fmt: skip
        self._extra = extra
        self._firsts: dict[str, subprocess.Popen] = {}  # a node's unshare: the parent of its first process
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> SlurmCluster:
        # Short: the names of sockets have 108 bytes at most. Not in pytest's folder, which other users may not enter.
        self.home = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.home.chmod(0o755)
        for name in ("state", "spool"):
            (self.home / name).mkdir()
        self.logs.mkdir(parents=True)
        try:
            self._write_files()
            self._make_namespace(self.login)
            self._start_munge()
            self.start_controller()
            for node in self.nodes:
                self.boot(node)
            self.wait_for_nodes("idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._firsts):
            self._kill_namespace(node)
        for daemon in self._daemons.values():
            daemon.wait(30)
        for node in self.nodes if self.is_cgroup else ():
            _remove_cgroups(FREEZER / f"slurm_{node}")
        shutil.rmtree(self.home)

    # ---- what a user does

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell on the login node has: nothing of pytest's, and one thread a process."""
        strange = ("SLURM", "PYTHON", "LOCAL_", "TRITON_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun and deepspeed lie beside our Python
        return {**kept, "PATH": path, "SLURM_CONF": str(self.home / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(
        self, *words: object, seconds: float = SECONDS, check: bool = True, folder: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node and what it wrote; AssertionError if it fails, unless `check` is off."""
        command = [*self._enter(self.login, folder), *map(str, words)]
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"{words}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, *words: object, out: Path, folder: Path | None = None, **more: str) -> subprocess.Popen:
        """A command on the login node that goes on; what it writes goes to the file `out`. Ended with the cluster."""
        with out.open("ab") as file:
            return subprocess.Popen(
                [*self._enter(self.login, folder), *map(str, words)],
                env={**self.environment, **more}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def submit(self, *words: object, folder: Path | None = None, **more: str) -> int:
        """The number of the job that `sbatch WORDS` makes."""
        return int(self.run("sbatch", "--parsable", *words, folder=folder, **more).stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, NodeList, ExitCode and others."""
        told = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", told))

    def job_state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def wait_for_state(self, number: int, *states: str, seconds: float = SECONDS) -> dict[str, str]:
        """The job, once it is in one of these states; fails as soon as it has ended in another."""

        def is_there() -> dict[str, str] | None:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            # A job that is being requeued is shown as what it was for a moment.
            assert job["JobState"] not in ENDED or job["Requeue"] == "1", f"job {number} is {job}"
            time.sleep(0.2)
            return None

        return wait_for(is_there, f"job {number} {' or '.join(states)}", seconds)

    def node_states(self) -> dict[str, str]:
        """Each node's state as sinfo tells it (idle, mixed, down, drained ...; `*`: it does not answer)."""
        told = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False).stdout
        return dict(line.split() for line in told.splitlines())

    def wait_for_nodes(self, state: str, *nodes: str, seconds: float = SECONDS) -> None:
        """Return when these nodes, or all, are in a state whose name begins so."""

        def are_there() -> bool:
            time.sleep(0.2)
            states = self.node_states()
            return bool(states) and all(states[node].startswith(state) for node in nodes or self.nodes)

        wait_for(are_there, f"nodes {state}, see {self.logs}", seconds)

    # ---- what happens to nodes

    def boot(self, node: str) -> None:
        """A node as after it was switched on: new processes, its slurmd runs; what ran there is gone."""
        if node in self._firsts:
            self._kill_namespace(node)
        self._make_namespace(node)
        self.start_slurmd(node)

    def crash(self, node: str) -> None:
        """All its processes die at once; the node's network says so to whoever is connected."""
        self._kill_namespace(node)

    def power_off(self, node: str) -> None:
        """It falls silent: nobody is told."""
        self.cut(node)
        self._kill_namespace(node)

    def cut(self, node: str) -> None:
        """Nothing comes or goes over its network, as when a switch dies; its processes live on."""
        self._ip(self.login, "link", "set", self._port(node), "nomaster")

    def heal(self, node: str) -> None:
        """The network of a node works, whether it was cut off or not."""
        self._ip(self.login, "link", "set", self._port(node), "master", "bridge")

    def mend(self) -> None:
        """All links work and all nodes are there; those that SLURM drained after a fault are used again."""
        for node in self.nodes:
            if node not in self._firsts:
                self.boot(node)
            self.heal(node)
        for node, state in self.node_states().items():
            if "drain" in state:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def start_slurmd(self, node: str) -> None:
        """SLURM's daemon on a node that has none."""
        self._start_daemon(node, "slurmd", "-D", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """SLURM's daemon on the node is killed; jobs there do not notice."""
        self._kill_daemon(node, "slurmd")

    def start_controller(self) -> None:
        self._start_daemon(self.login, "slurmctld", "-D")

    def kill_controller(self) -> None:
        self._kill_daemon(self.login, "slurmctld")

    def processes(self, node: str, *words: str) -> list[int]:
        """The processes of a node, as this process numbers them; those whose first three words have all of these in it.

        Programs that are named further on do not count: what srun or a supervisor is to start.
        """
        namespace = os.readlink(f"/proc/{self._first(node)}/ns/pid")
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    line = Path(f"/proc/{entry}/cmdline").read_text(errors="replace").split("\0")[:3]
                    if line[0] and all(word in " ".join(line) for word in words):
                        found.append(int(entry))
        return sorted(found)

    def signal(self, node: str, number: signal.Signals, *words: str) -> list[int]:
        """Send a signal to the processes of a node with these words, and say which they are; fails if none is."""
        found = self.processes(node, *words)
        assert found, f"no process {words} on {node}"
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return found

    # ---- making it

    def _write_files(self) -> None:
        home = self.home
        addresses = {node: f"{NETWORK}.{10 + number}" for number, node in enumerate(self.nodes)}
        self._addresses = {self.login: f"{NETWORK}.1", **addresses}
        lines = ["127.0.0.1 localhost", *(f"{address} {node}" for node, address in self._addresses.items())]
        (home / "hosts").write_text("\n".join(lines) + "\n")
        (home / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no name server is asked
        key = home / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(128))
        (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # of no effect where no cgroup plugin is chosen
        (home / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        home, logs, given = self.home, self.logs, self._settings
        nodes = [f"NodeName={node} NodeAddr={self._addresses[node]} CPUs={given['cpus']} "
                 f"RealMemory={given['memory_mb']}" for node in self.nodes]  # fmt: skip
        # Paths in slurm.conf must not be those of another SLURM on this machine; the rest are times short for tests.
        return "\n".join([
            "ClusterName=test", f"SlurmctldHost={self.login}({self._addresses[self.login]})",
            "SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge", "CredType=cred/munge",
            f"AuthInfo=socket={home}/munge.socket,cred_expire={given['requeue_wait']}",
            f"StateSaveLocation={home}/state", f"SlurmdSpoolDir={home}/spool/%n",
            f"SlurmctldPidFile={home}/slurmctld.pid", f"SlurmdPidFile={home}/%n.pid",
            f"SlurmctldLogFile={logs}/slurmctld.log", f"SlurmdLogFile={logs}/%n.log", "MailProg=/bin/true",
            f"ProctrackType=proctrack/{'cgroup' if self.is_cgroup else 'linuxproc'}", "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/filetxt", f"JobCompLoc={logs}/jobs.txt", "SwitchType=switch/none", "MpiDefault=none",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "SlurmdParameters=config_overrides",
            "ReturnToService=2", "SlurmctldTimeout=30", f"SlurmdTimeout={given['slurmd_timeout']}",
            f"KillWait={given['kill_wait']}", "UnkillableStepTimeout=120", "MinJobAge=3600", "JobRequeue=1",
            "SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0",
            "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", *self._extra, *nodes,
            f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={given['grace']} "
            "MaxTime=INFINITE State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP", "",
        ])  # fmt: skip

    def _make_namespace(self, node: str) -> None:
        words = [*NAMESPACE.split(), "sh", "-c", FIRST_PROCESS, "sh", node, str(self.home)]
        first = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._firsts[node] = first
        assert first.stdout.readline() == "up\n", f"{node} cannot be made"
        if node == self.login:
            self._ip(node, "link", "add", "bridge", "type", "bridge")
            self._ip(node, "addr", "add", f"{self._addresses[node]}/24", "dev", "bridge")
            self._ip(node, "link", "set", "bridge", "up")
            return
        port = self._port(node)
        peer = ("peer", "name", "eth0", "netns", self._first(node))
        if self._has_port(node):  # for as long as connections of the node that died wait for answers
            self._ip(self.login, "link", "delete", port)
        self._ip(self.login, "link", "add", port, "type", "veth", *peer)
        self._ip(self.login, "link", "set", port, "master", "bridge", "up")
        self._ip(node, "addr", "add", f"{self._addresses[node]}/24", "dev", "eth0")
        self._ip(node, "link", "set", "eth0", "up")

    def _kill_namespace(self, node: str) -> None:
        unshare = self._firsts.pop(node)
        with contextlib.suppress(StopIteration, ProcessLookupError):
            os.kill(next(_children(unshare.pid)), signal.SIGKILL)
        unshare.kill()
        unshare.wait()
        unshare.stdout.close()

    def _start_munge(self) -> None:
        home = self.home
        words = {"key-file": home / "munge.key", "socket": home / "munge.socket", "seed-file": home / "munge.seed",
                 "pid-file": home / "munged.pid", "log-file": home / "munged.log"}  # fmt: skip
        self._start_daemon(self.login, "munged", "--foreground", *(f"--{name}={path}" for name, path in words.items()))
        wait_for((home / "munge.socket").exists, "munged")

    def _start_daemon(self, node: str, *words: str) -> None:
        if old := self._daemons.get(f"{words[0]} {node}"):
            old.wait(30)
        with (self.logs / f"{words[0]}-{node}.out").open("ab") as out:
            self._daemons[f"{words[0]} {node}"] = subprocess.Popen(
                [*self._enter(node), *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _kill_daemon(self, node: str, name: str) -> None:
        daemon = self._daemons[f"{name} {node}"]
        os.kill(next(_children(daemon.pid)), signal.SIGKILL)
        daemon.wait(30)

    def _enter(self, node: str, folder: Path | None = None) -> list[str]:
        place = f"--wd={folder or self.home}"
        return ["nsenter", "-t", str(self._first(node)), "--mount", "--uts", "--ipc", "--net", "--pid", place, "--"]

    def _first(self, node: str) -> int:
        return next(_children(self._firsts[node].pid))

    def _ip(self, node: str, *words: object) -> None:
        command = ["nsenter", "-t", str(self._first(node)), "--net", "ip", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _port(self, node: str) -> str:
        return f"to-{node}"

    def _has_port(self, node: str) -> bool:
        command = ["nsenter", "-t", str(self._first(self.login)), "--net", "ip", "link", "show", self._port(node)]
        return subprocess.run(command, capture_output=True).returncode == 0


def _children(process: int) -> Iterator[int]:
    """The processes that a process with one thread has started."""
    try:
        yield from map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    except FileNotFoundError:
        return


def _remove_cgroups(folder: Path) -> None:
    """What SLURM leaves of its groups; those that still hold a process that is just dying are waited for."""
    for path in sorted(folder.glob("**/"), reverse=True) if folder.exists() else ():

        def is_gone(path: Path = path) -> bool:
            with contextlib.suppress(FileNotFoundError, OSError):
                path.rmdir()
            return not path.exists()

        wait_for(is_gone, f"{path} to be empty", 30)
