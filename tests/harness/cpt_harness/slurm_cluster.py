"""A throw-away SLURM on one machine: a real slurmctld and slurmd of the distribution, a namespace for each node.

    with SlurmCluster(folder, nodes=3) as cluster:
        cluster.run("srun", "-N2", "hostname")

    login: munged, slurmctld --+-- bridge --+-- node 1: slurmd --> slurmstepd --> tasks
                               |            +-- node 2: ...

Nodes are those of machines.py: they can be cut off, crash and lose power. Two clusters do not meet; nothing is left.

Needs what machines need, and Debian's slurm-wlm (tried: 22.05) and munge; `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import stat
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL

from cpt_harness import machines
from cpt_harness.machines import Machines, children_of
from cpt_harness.runs import wait_for

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged")
PACKAGES = "slurm-wlm munge iproute2"
FREEZER = Path("/sys/fs/cgroup/freezer")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
SECONDS = 120.0


def why_not() -> str | None:
    """What this machine lacks for a cluster, in a line; None if nothing."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(missing)} here: apt-get install --no-install-recommends {PACKAGES}"
    return machines.why_not()


class SlurmCluster(Machines):
    """A cluster that is up inside `with`; `folder` gets its logs.

    `nodes` and `login` are host names. Of GPUs there is only what SLURM gives out: names of devices. Partitions: `low`
    (the default one; preempted with a grace time, requeued) and `high`. Seconds: `slurmd_timeout` until a silent node
    counts as down (plus up to 20), `kill_wait` between SIGTERM and SIGKILL, `grace` for a job that is preempted,
    `requeue_wait` before a requeued job starts again.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        cpus: int = 4,
        memory_mb: int = 6000,
        gpus: int = 0,
        slurmd_timeout: int = 15,
        kill_wait: int = 30,
        grace: int = 20,
        requeue_wait: int = 5,
        extra: Sequence[str] = (),
    ) -> None:
        name = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
        self.login = f"{name}-login"
        self.nodes = [f"{name}-{number}" for number in range(1, nodes + 1)]
        super().__init__([self.login, *self.nodes])
        self.logs = folder / "slurm-logs"
        self.requeue_wait = requeue_wait
        self.is_cgroup = FREEZER.is_dir()  # without it what a task leaves behind outlives its job
        self._settings = {
            "cpus": cpus, "memory_mb": memory_mb, "gpus": gpus, "slurmd_timeout": slurmd_timeout,
            "kill_wait": kill_wait, "grace": grace, "requeue_wait": requeue_wait,
        }  # fmt: skip
        self._extra = extra
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> SlurmCluster:
        self.logs.mkdir(parents=True)
        try:
            self._write_files()
            self.switch_on(self.login)
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
        self.close()
        for daemon in self._daemons.values():
            daemon.wait(30)
        for node in self.nodes if self.is_cgroup else ():
            _remove_cgroups(FREEZER / f"slurm_{node}")

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
        command = [*self.enter(self.login, folder), *map(str, words)]
        done = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=seconds
        )
        assert not check or done.returncode == 0, f"{words}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, *words: object, out: Path, folder: Path | None = None, **more: str) -> subprocess.Popen:
        """A command on the login node that goes on; what it writes goes to the file `out`. Ended with the cluster."""
        with out.open("ab") as file:
            return subprocess.Popen(
                [*self.enter(self.login, folder), *map(str, words)],
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
        self.switch_on(node)
        self.start_slurmd(node)

    def crash(self, node: str) -> None:
        """All its processes die at once; the node's network says so to whoever is connected."""
        self.switch_off(node)

    def power_off(self, node: str) -> None:
        """It falls silent: nobody is told."""
        self.cut(node)
        self.switch_off(node)

    def mend(self) -> None:
        """All links work and all nodes are there; those that SLURM drained after a fault are used again."""
        for node in self.nodes:
            if not self.is_on(node):
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

    # ---- making it

    def _write_files(self) -> None:
        home = self.home
        for name in ("state", "spool"):
            (home / name).mkdir()
        key = home / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(128))
        (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # of no effect where no cgroup plugin is chosen
        gpus = [home / f"gpu{number}" for number in range(self._settings["gpus"])]
        for device in gpus:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # any device will do; this one is /dev/null's
        (home / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in gpus))
        (home / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        home, logs, given = self.home, self.logs, self._settings
        has = f"CPUs={given['cpus']} RealMemory={given['memory_mb']}"
        if given["gpus"]:
            has += f" Gres=gpu:{given['gpus']}"
        nodes = [f"NodeName={node} NodeAddr={self.addresses[node]} {has}" for node in self.nodes]
        # Paths in slurm.conf must not be those of another SLURM on this machine; the rest are times short for tests.
        return "\n".join([
            "ClusterName=test", f"SlurmctldHost={self.login}({self.addresses[self.login]})",
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
            "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "GresTypes=gpu",
            *self._extra, *nodes,
            f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={given['grace']} "
            "MaxTime=INFINITE State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP", "",
        ])  # fmt: skip

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
                [*self.enter(node), *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _kill_daemon(self, node: str, name: str) -> None:
        daemon = self._daemons[f"{name} {node}"]
        os.kill(next(children_of(daemon.pid)), SIGKILL)
        daemon.wait(30)


def _remove_cgroups(folder: Path) -> None:
    """What SLURM leaves of its groups; those that still hold a process that is just dying are waited for."""
    for path in sorted(folder.glob("**/"), reverse=True) if folder.exists() else ():

        def is_gone(path: Path = path) -> bool:
            with contextlib.suppress(FileNotFoundError, OSError):
                path.rmdir()
            return not path.exists()

        wait_for(is_gone, f"{path} to be empty", 30)
