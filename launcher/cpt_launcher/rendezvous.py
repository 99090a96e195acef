"""Finds out who this process is among the others, and where they all meet, whatever started it.

    started by            told by                                                        looked for
    deepspeed, torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT         first
    srun                  SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS and others   second
    python                nothing: a world of one                                        last

The environment is passed in, so that everything here but the two questions about ports is a pure function of it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cpt.config import Fault

LOOPBACK = "127.0.0.1"
FIRST_SLURM_PORT = 20000  # below Linux's own range for outgoing connections, which begins at 32768
NUM_SLURM_PORTS = 10000
FIRST_SPECIAL_STEP = 2**32 - 16  # batch scripts, interactive shells and the like have step ids from here up


@dataclass(frozen=True)
class Rendezvous:
    """One process's place in the world, and the address at which rank 0 waits for the others."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int
    started_by: str  # "deepspeed", "torchrun", "srun" or "python"
    job: str | None = None  # the SLURM job that it is a part of
    start: str = "a run"  # what tells this start from others, as far as all its processes know it without talking

    def device_index(self, num_visible_devices: int) -> int:
        """Which of the accelerators that this process can see is its own.

        0 where it sees one at most: SLURM may show each task only its own device, which then is number 0 for all.

        Raises Fault if it sees several, but fewer than the processes on this machine need.
        """
        if num_visible_devices <= 1:
            return 0
        if self.local_rank >= num_visible_devices:
            raise Fault(
                f"local rank {self.local_rank} has no device: {self.local_world_size} processes run on this machine "
                f"and {num_visible_devices} devices are visible; start at most {num_visible_devices} processes here"
            )
        return self.local_rank


def find_rendezvous(
    environment: Mapping[str, str],
    arguments_local_rank: int | None = None,
    free_port: Callable[[], int] | None = None,
) -> Rendezvous:
    """This process's place, from the variables of whatever started it.

    `arguments_local_rank` is the `--local_rank` that deepspeed puts on the command line. `free_port` gives the port
    for a world of one; None stands for `pick_free_port`.

    Raises Fault, with the variable and its value, where the variables contradict one another or are no numbers.
    """
    found = _find(environment, arguments_local_rank, free_port or pick_free_port)
    return replace(found, job=environment.get("SLURM_JOB_ID") or None, start=name_of_start(environment, found))


def _find(environment: Mapping[str, str], arguments_local_rank: int | None, free_port: Callable[[], int]) -> Rendezvous:
    if "RANK" in environment:
        return from_torch_variables(environment, arguments_local_rank, free_port)
    if "SLURM_PROCID" in environment and is_slurm_step(environment):
        return from_slurm_step(environment, free_port)
    if number(environment, "WORLD_SIZE", at_least=1, otherwise=1) > 1:
        raise Fault(
            f"WORLD_SIZE = {environment['WORLD_SIZE']} but RANK is not set; "
            f"start with srun, torchrun or deepspeed, or unset it for a single process"
        )
    if arguments_local_rank not in (None, 0):
        raise Fault(
            f"--local_rank = {arguments_local_rank} but RANK is not set; start with deepspeed, torchrun or srun"
        )
    return Rendezvous(0, 0, 1, 1, LOOPBACK, free_port(), "python")


# ---- deepspeed and torchrun


def from_torch_variables(
    environment: Mapping[str, str], arguments_local_rank: int | None, free_port: Callable[[], int]
) -> Rendezvous:
    """The place that RANK, WORLD_SIZE and their like tell, as deepspeed and torchrun set them."""
    rank = number(environment, "RANK")
    if "WORLD_SIZE" not in environment:
        raise Fault(f"RANK = {rank} but WORLD_SIZE is not set; set both, or neither for a single process")
    world_size = number(environment, "WORLD_SIZE", at_least=1)
    if rank >= world_size:
        raise Fault(f"RANK = {rank} is not below WORLD_SIZE = {world_size}; ranks count from 0")
    local_rank = number(environment, "LOCAL_RANK", otherwise=arguments_local_rank if world_size > 1 else 0)
    if arguments_local_rank not in (None, local_rank):
        raise Fault(f"LOCAL_RANK = {local_rank} but --local_rank = {arguments_local_rank}; give one of them")
    size_variable = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"  # torchrun, deepspeed
    if size_variable not in environment and world_size > 1:
        raise Fault(
            f"WORLD_SIZE = {world_size} but LOCAL_WORLD_SIZE is not set; "
            f"set it to the number of processes on this machine"
        )
    local_world_size = number(environment, size_variable, at_least=1, otherwise=1)
    check_local(local_rank, "LOCAL_RANK", local_world_size, size_variable, world_size)
    if world_size == 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        address, port = LOOPBACK, free_port()
    else:
        address, port = text(environment, "MASTER_ADDR"), port_number(environment)
    started_by = "deepspeed" if "CROSS_RANK" in environment or arguments_local_rank is not None else "torchrun"
    return Rendezvous(rank, local_rank, world_size, local_world_size, address, port, started_by)


# ---- srun


def is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process.

    An sbatch script has SLURM_PROCID = 0 and SLURM_NTASKS as well, but is no step: plain python in it is a world of
    one, and would wait for ever for tasks that nobody started.
    """
    return number(environment, "SLURM_STEP_ID", otherwise=FIRST_SPECIAL_STEP) < FIRST_SPECIAL_STEP


def from_slurm_step(environment: Mapping[str, str], free_port: Callable[[], int]) -> Rendezvous:
    """The place that SLURM tells a task of a step."""
    size_variable = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank = number(environment, "SLURM_PROCID")
    world_size = number(environment, size_variable, at_least=1)
    if rank >= world_size:
        raise Fault(f"SLURM_PROCID = {rank} is not below {size_variable} = {world_size}")
    if number(environment, "WORLD_SIZE", at_least=1, otherwise=world_size) != world_size:
        raise Fault(
            f"WORLD_SIZE = {environment['WORLD_SIZE']} but srun started {world_size} tasks ({size_variable}); "
            f"do not set WORLD_SIZE, or start as many tasks"
        )
    if world_size == 1:
        # Several steps of one task may share a node and a job id, so a port made from the job id could be taken.
        return Rendezvous(0, 0, 1, 1, LOOPBACK, free_port(), "srun")
    local_rank = number(environment, "SLURM_LOCALID")
    local_world_size = tasks_on_this_node(environment, world_size)
    check_local(local_rank, "SLURM_LOCALID", local_world_size, "SLURM_STEP_TASKS_PER_NODE", world_size)
    address = text(environment, "MASTER_ADDR") if "MASTER_ADDR" in environment else step_hosts(environment)[0]
    port = port_number(environment) if "MASTER_PORT" in environment else port_of_step(environment)
    return Rendezvous(rank, local_rank, world_size, local_world_size, address, port, "srun")


def step_hosts(environment: Mapping[str, str]) -> list[str]:
    """The machines of the step, in SLURM's order."""
    variable = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
    return expand_hosts(text(environment, variable), variable)


def port_of_step(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on without talking; another for each try, so that old never meets new.

    By lot: neighbouring jobs may share a node, and a requeued one must not come to the next one's port.
    """
    job = number(environment, "SLURM_JOB_ID")
    restart = number(environment, "SLURM_RESTART_COUNT", otherwise=0)  # not set on the first try
    step = number(environment, "SLURM_STEP_ID")
    lot = hashlib.blake2b(f"{job}.{step}.{restart}".encode(), digest_size=8).digest()
    return FIRST_SLURM_PORT + int.from_bytes(lot, "big") % NUM_SLURM_PORTS


def name_of_start(environment: Mapping[str, str], found: Rendezvous) -> str:
    """`SLURM step 4711.0, restart 2`, `torchrun's run none`, or only `a run`."""
    if found.started_by == "srun":
        restart = environment.get("SLURM_RESTART_COUNT", "0")
        step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
        return f"SLURM step {step}" + (f", restart {restart}" if restart != "0" else "")
    run = environment.get("TORCHELASTIC_RUN_ID")
    return f"torchrun's run {run}" if run else "a run"


def tasks_on_this_node(environment: Mapping[str, str], world_size: int) -> int:
    """How many tasks of the step run on this machine."""
    variable = "SLURM_STEP_TASKS_PER_NODE"
    if variable not in environment:
        if len(step_hosts(environment)) == 1:
            return world_size
        raise Fault(f"{variable} is not set in a step on several nodes; start the tasks with srun")
    counts = expand_task_counts(environment[variable], variable)
    node = number(environment, "SLURM_NODEID", otherwise=0 if len(counts) == 1 else None)
    if sum(counts) != world_size or node >= len(counts):
        raise Fault(
            f"{variable} = {environment[variable]} does not fit {world_size} tasks and SLURM_NODEID = {node}; "
            f"it counts {sum(counts)} tasks on {len(counts)} nodes"
        )
    return counts[node]


def expand_task_counts(counts: str, variable: str = "SLURM_STEP_TASKS_PER_NODE") -> list[int]:
    """Tasks on each node in order: `2(x3),1` is 2, 2, 2, 1."""
    expanded: list[int] = []
    for part in counts.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip(), re.ASCII)
        if not matched:
            raise Fault(f"{variable} = {counts} is not a list of task counts such as 2(x3),1")
        expanded += [int(matched[1])] * int(matched[2] or 1)
    return expanded


def expand_hosts(hosts: str, variable: str = "SLURM_STEP_NODELIST") -> list[str]:
    """Host names in SLURM's order: `n[1-2,07],gpu-a` is n1, n2, n07, gpu-a; leading zeros are kept.

    Several brackets in one name multiply, the last one running fastest.
    """
    expanded: list[str] = []
    for name in re.split(r",(?![^\[]*\])", hosts.strip()):
        pieces = re.split(r"\[([^\[\]]*)\]", name)  # text, bracket, text, bracket, ..., text
        choices = [[piece] if place % 2 == 0 else expand_bracket(piece) for place, piece in enumerate(pieces)]
        names = ["".join(chosen) for chosen in itertools.product(*choices)]
        if not names or not all(re.fullmatch(r"[\w.:-]+", found, re.ASCII) for found in names):
            raise Fault(f"{variable} = {hosts} is not a list of hosts such as n[1-3,7],gpu-a")
        expanded += names
    return expanded


def expand_bracket(bracket: str) -> list[str]:
    """`1-3,07` is 1, 2, 3, 07; an empty list where it is no such thing."""
    numbers: list[str] = []
    for part in bracket.split(","):
        matched = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if not matched:
            return []
        first, last = matched[1], matched[2] or matched[1]
        numbers += [f"{value:0{len(first)}d}" for value in range(int(first), int(last) + 1)]
    return numbers


# ---- reading variables


def text(environment: Mapping[str, str], name: str) -> str:
    """A variable's value; Fault if it is empty or not set."""
    value = environment.get(name, "").strip()
    if not value:
        raise Fault(f"{name} is not set; deepspeed, torchrun and srun set it: start with one of them, or set it")
    return value


def number(environment: Mapping[str, str], name: str, at_least: int = 0, otherwise: int | None = None) -> int:
    """A variable's value as a whole number; Fault if it is none or too small."""
    if name not in environment and otherwise is not None:
        return otherwise
    value = text(environment, name)
    if not re.fullmatch(r"\d+", value, re.ASCII) or int(value) < at_least:
        raise Fault(f"{name} = {value} is not a whole number from {at_least} up")
    return int(value)


def port_number(environment: Mapping[str, str]) -> int:
    """MASTER_PORT; Fault if it is no port."""
    port = number(environment, "MASTER_PORT", at_least=1)
    if port > 65535:
        raise Fault(f"MASTER_PORT = {port} is not a port; ports go from 1 to 65535")
    return port


def check_local(
    local_rank: int, rank_variable: str, local_world_size: int, size_variable: str, world_size: int
) -> None:
    """Fault if the local rank does not fit the processes of this machine."""
    if local_rank >= local_world_size:
        raise Fault(f"{rank_variable} = {local_rank} is not below {size_variable} = {local_world_size}")
    if local_world_size > world_size:
        raise Fault(f"{size_variable} = {local_world_size} is above the number of all processes, {world_size}")


# ---- ports


def is_port_free(address: str, port: int) -> bool:
    """Whether a server could listen at this address of this machine now. Another may take it the moment after."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As torch's store does: a port on which an ended run left only closing connections is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError:
        return False
    return True


def pick_free_port() -> int:
    """A port that nobody listens on at any address of this machine.

    Out of those that no outgoing connection is given: the machine's own free ones may be taken by any program in the
    seconds until ranks meet there. Raises Fault if the machine gives none.
    """
    for _ in range(16):
        port = FIRST_SLURM_PORT + secrets.randbelow(NUM_SLURM_PORTS)
        if is_port_free("0.0.0.0", port):
            return port
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]
    except OSError as error:
        raise Fault(f"this machine gives no free port ({error}); end programs that hold many ports") from None
