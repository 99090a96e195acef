"""From what `cpt submit` is asked for to the text of an sbatch file; nothing is run and nothing is written here.

Two languages quote in two ways: words for the shell (`shlex.quote`), and values in `#SBATCH` lines, which SLURM reads.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpt.config import Fault
from cpt.config.faults import nearest

TEMPLATE = Path(__file__).parent / "templates" / "job.sbatch"
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?", re.ASCII)
_SHORTEST_GRACE = 10  # seconds
_EARLIEST = 60  # seconds: SLURM may tell a job so much before the time that it was asked to


@dataclass(frozen=True)
class Request:
    """A job to submit, or several that follow one another.

    `run`, `folder`: of the run, and where the job is to stand when it reads relative paths; `code`: what it runs from;
    `config`: the settings. `nodes` at most and `min_nodes` at least. `grace`: seconds before the time limit at which
    the run is told to save. `repeat`: who goes on when the time is over: the same job, `jobs` of them in a chain, or
    those of an array. `options`: further lines for sbatch, as they are. `wait_seconds`: from the end of the first task
    to that of all. `more_runs`: those of a version plan after its main path, which is `run`.
    """

    run: Path
    folder: Path
    code: Path
    config: Path
    python: str
    name: str
    nodes: int = 1
    min_nodes: int | None = None
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    grace: int = 300
    repeat: Literal["requeue", "chain", "array"] = "requeue"
    jobs: int = 1
    restarts: int = 3
    interface: str | None = None
    options: Sequence[str] = ()
    wait_seconds: int = 120
    more_runs: Sequence[Path] = ()

    @property
    def fewest_nodes(self) -> int:
        """Nodes that it begins on at least."""
        return self.min_nodes or self.nodes

    @property
    def num_submissions(self) -> int:
        """How often the script is given to sbatch."""
        return self.jobs if self.repeat == "chain" else 1

    @property
    def is_range(self) -> bool:
        """Whether SLURM may choose how many nodes it gives."""
        return self.fewest_nodes < self.nodes

    def faults(self) -> list[str]:
        """What SLURM would refuse, or misunderstand."""
        counts = {"--nodes": self.nodes, "--min-nodes": self.min_nodes, "--tasks-per-node": self.tasks_per_node,
                  "--gpus-per-node": self.gpus_per_node, "--cpus-per-task": self.cpus_per_task,
                  "--jobs": self.jobs}  # fmt: skip
        faults = [f"{name} {count}: at least 1" for name, count in counts.items() if count is not None and count < 1]
        if self.restarts < 0:
            faults.append(f"--restarts {self.restarts}: at least 0")
        if self.min_nodes and self.min_nodes > self.nodes:
            faults.append(f"--min-nodes {self.min_nodes} is above --nodes {self.nodes}")
        if self.gpus_per_node and self.gpus_per_node != self.tasks_per_node:
            faults.append(
                f"--tasks-per-node {self.tasks_per_node} with --gpus-per-node {self.gpus_per_node}: one task a GPU; "
                "leave --tasks-per-node out, or write a template of your own (--template)"
            )
        if (self.repeat == "requeue") != (self.jobs == 1):
            needs = "a chain or array needs --jobs N" if self.jobs == 1 else "--jobs is for chain and array"
            faults.append(f"--repeat {self.repeat} with --jobs {self.jobs}: {needs}")
        faults += self._faults_of_time()
        named = {"--name": self.name, "--partition": self.partition, "--account": self.account, "--qos": self.qos,
                 "--constraint": self.constraint, "the run's folder": str(self.run)}  # fmt: skip
        faults += [fault for name, value in named.items() if value is not None and (fault := _unfit(name, value))]
        if "\\" in str(self.run):
            faults.append(f"output = {self.run}: SLURM takes no \\ in the name of a log file; name another folder")
        faults += [f"output = {run} breaks the line" for run in self.more_runs if not _is_line(str(run))]
        paths = {"this folder": self.folder, "the code's folder": self.code, "--interface": self.interface or ""}
        faults += [f"{name} {str(path)!r} breaks the line" for name, path in paths.items() if not _is_line(str(path))]
        for option in self.options:
            if not _is_line(option) or not re.match(r"--?[a-zA-Z]", option):
                faults.append(f"--option {option!r}: one option of sbatch's, such as --exclusive")
        return faults

    def _faults_of_time(self) -> list[str]:
        """A time limit that is none, or leaves no time to train."""
        faults = []
        if self.grace < _SHORTEST_GRACE:
            faults.append(f"--grace {self.grace}: at least {_SHORTEST_GRACE} seconds")
        if self.time is None:
            return faults
        seconds = seconds_of(self.time)
        if seconds is None:
            return [*faults, f"--time {self.time}: such as 24:00:00, 90 (minutes) or 2-12:00:00"]
        if seconds <= self.grace + _EARLIEST:
            faults.append(f"--time {self.time} leaves no time beside --grace {self.grace} s; ask for more, or lower it")
        return faults

    @property
    def directives(self) -> list[str]:
        """The `#SBATCH` lines."""
        log = "job-%A_%a.log" if self.repeat == "array" else "job-%j.log"
        # A dot or a digit after % would be a pattern, too.
        folder = str(self.run / "logs").replace("%", "%%")
        nodes = f"{self.min_nodes}-{self.nodes}" if self.is_range else self.nodes
        values: dict[str, object] = {
            "job-name": self.name,
            "output": f"{folder}/{log}",
            "open-mode": "append",
            "nodes": nodes,
            "ntasks-per-node": None if self.is_range else self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node,
            # Of a job that names its tasks SLURM makes as many as --min-nodes has, and takes no more nodes than they
            # need (22.05). So it asks for one a node, with the cores of all; srun says how many there are.
            "cpus-per-task": self.tasks_per_node * (self.cpus_per_task or 1) if self.is_range else self.cpus_per_task,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time,
            "signal": f"B:USR1@{self.grace}",
        }
        lines = [f"#SBATCH --{name}={_directive(str(value))}" for name, value in values.items() if value is not None]
        lines.append("#SBATCH --requeue")
        if self.repeat == "array":
            lines.append(f"#SBATCH --array=1-{self.jobs}%1")
        if self.repeat == "chain":
            lines.append("#SBATCH --dependency=singleton")
        return [*lines, *(f"#SBATCH {option}" for option in self.options)]

    @property
    def words(self) -> dict[str, str]:
        """What stands in a template's places, each as the shell needs it."""
        # Killed in time for the job to be requeued before its limit.
        kill_after = max(self.grace - 30, self.grace // 2)
        options = ["--restarts", self.restarts, "--grace", kill_after]
        if self.repeat != "requeue":
            options.append("--no-requeue")
        for run in self.more_runs:
            options += ["--run", run]
        srun_options = [f"--cpus-per-task={self.cpus_per_task or 1}"] if self.cpus_per_task or self.is_range else []
        return {
            "directives": "\n".join(self.directives),
            "folder": shlex.quote(str(self.folder)),
            "exports": _exports(self.interface),
            "python": shlex.quote(self.python),
            "code": shlex.quote(str(self.code)),
            "run": shlex.quote(str(self.run)),
            "config": shlex.quote(str(self.config)),
            "supervise_options": shlex.join(map(str, options)),
            "srun_options": shlex.join(srun_options),
            "tasks_per_node": str(self.tasks_per_node),
            "wait_seconds": str(self.wait_seconds),
        }


def render(request: Request, template: Path = TEMPLATE) -> str:
    """The text of the sbatch file. Raises Fault with everything that is wrong with the request or the template."""
    faults = request.faults()
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Fault([*faults, f"--template {template}: {getattr(error, 'strerror', None) or error}"]) from None
    words = request.words if not faults else {}
    faults += _faults_of_template(template, text)
    if faults:
        raise Fault(faults)
    # A place that stands empty on a line of its own takes the line with it; so does one within words its space.
    filled = re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)
    return re.sub(r"(?m)(?<=\S)  +\\$", " \\\\", filled)


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit as SLURM writes it: `90` and `90:30` are minutes, `1-12` is 36 hours; None if none."""
    found = _TIME.fullmatch(time)
    if not found:
        return None
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] is not None:
        return ((int(found["days"]) * 24 + first) * 60 + second) * 60 + third
    return (first * 60 + second) * 60 + third if found["third"] is not None else first * 60 + second


def _exports(interface: str | None) -> str:
    """Lines that name the network interface; none if nobody named one."""
    if interface is None:
        return ""
    lines = ["# The network that the nodes reach one another by; asked for with --interface."]
    lines += [f"export {name}={shlex.quote(interface)}" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")]
    return "\n".join(lines) + "\n"


def _directive(value: str) -> str:
    """A value as sbatch reads it: in quotes if it has anything that it would take for more than a letter."""
    if re.fullmatch(r"[\w@%+=:,./&|*()\[\]-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _unfit(name: str, value: str) -> str | None:
    """Why a value cannot stand in a `#SBATCH` line."""
    if not _is_line(value):
        return f"{name} {value!r} breaks the line; name it in letters that can be seen"
    if not value.strip():
        return f"{name} is empty; leave it out"
    return None


def _is_line(text: str) -> bool:
    """Whether it stays on its line, and is text at all."""
    return not re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", text)


def _faults_of_template(template: Path, text: str) -> list[str]:
    """Places that nothing fills; none for the `#SBATCH` lines."""
    known = _PLACES
    places = set(re.findall(r"\{\{(\w+)\}\}", text))
    faults = [
        f"--template {template}: there is no {{{{{place}}}}}; {nearest(place, known)}"
        for place in sorted(places - known)
    ]
    if "directives" not in places:
        faults.append(f"--template {template}: it has no place {{{{directives}}}} for the #SBATCH lines")
    return faults


_PLACES: frozenset[str] = frozenset(
    Request(Path(), Path(), Path(), Path(), "", "").words
)  # of an empty request: the same places as in any
