"""Who started this process, DeepSpeed's launcher or torchrun's agent, and whether they are still there.

    deepspeed (its runner)  -->  deepspeed.launcher.launch  -->  ranks
    torchrun (its agent)    --------------------------------->  ranks

Each of them that is killed, and the runner at SIGTERM too, leaves what it started running: ranks that nobody waits for
and that keep the next start out of the run's folder. Others are not looked at: SLURM ends its own, and a shell that
ends may well have been meant to leave its processes running (nohup). A runner on another machine cannot be seen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# What Python was asked to run, a file or a module, by the name that a person knows it by.
NAMES = {
    "deepspeed": "deepspeed",
    "ds": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed.launcher.launch",
    "torchrun": "torchrun",
    "supervise.py": "supervise.py",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
}
# A variable that each sets for what it starts, and for nothing else.
VARIABLES = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed.launcher.launch"}


@dataclass(frozen=True)
class Launcher:
    """A process that started this one. `started`: in ticks since boot; None where the system does not tell."""

    pid: int
    name: str
    started: str | None

    def is_gone(self) -> bool:
        """Whether it has ended, even if nobody has asked for its exit status yet; costs one small read."""
        if self.started is None:
            return os.getppid() != self.pid
        try:
            state, _, started = _state_parent_start(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:  # too many open files, say: no reason to end a run
            return False
        return state in "ZX" or started != self.started  # numbers of processes are given again


@dataclass(frozen=True)
class Launchers:
    """Those that started this process, the nearest first; none under srun and plain python."""

    found: Sequence[Launcher] = ()

    def why_gone(self) -> str | None:
        """One line that says which of them has ended; None as long as all are there."""
        for launcher in self.found:
            if launcher.is_gone():
                return f"the launcher (process {launcher.pid}, {launcher.name}) is gone"
        return None


def find_launchers(environment: Mapping[str, str]) -> Launchers:
    """The launchers among the processes that this one descends from.

    Without /proc only the parent, if `environment` says that a launcher set it.
    """
    if not (PROC / "self" / "stat").exists():
        told = [name for variable, name in VARIABLES.items() if variable in environment]
        return Launchers([Launcher(os.getppid(), told[0], None)] if told else ())
    found, pid = [], os.getppid()
    while pid > 0:  # 0: what started it lies outside this container
        try:
            words = (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")[:-1]
            _, parent, started = _state_parent_start(pid)
        except OSError:  # it ended just now, or is hidden from us
            break
        if name := NAMES.get(program_of(words)):
            found.append(Launcher(pid, name, started))
        pid = parent
    return Launchers(found)


def program_of(words: Sequence[str]) -> str:
    """What a command line asks Python to run: the file's name without its folder, or the module; "" if it asks none."""
    if not words or not os.path.basename(words[0]).startswith("python"):
        return ""
    rest = iter(words[1:])
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if word in ("-X", "-W"):  # options with a value
            next(rest, None)
        elif not word.startswith("-"):
            return os.path.basename(word)
        elif word.startswith("-c"):
            break
    return ""


def _state_parent_start(pid: int) -> tuple[str, int, str]:
    """State, parent and start of a process. Raises OSError if there is no such process."""
    with (PROC / str(pid) / "stat").open("rb") as file:
        # The second field is the program's name in parentheses, and may hold anything.
        fields = file.read().decode(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[1]), fields[19]
