"""Ranks and the meeting place from tables of environments, as deepspeed, torchrun, srun and plain python give them."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from cpt.config import Fault
from cpt_launcher import rendezvous
from cpt_launcher.rendezvous import Rendezvous, expand_hosts, expand_task_counts, find_rendezvous

DEEPSPEED = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "40001",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NODELIST": "n[1-3]",
}  # fmt: skip
SBATCH_SHELL = {
    "SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "n[1-2]",
}  # fmt: skip


def find(environment: dict[str, str], arguments_local_rank: int | None = None) -> Rendezvous:
    return find_rendezvous(environment, arguments_local_rank, free_port=lambda: 555)


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


FOUND = {
    "deepspeed on two nodes": (DEEPSPEED, 1, Rendezvous(3, 1, 4, 2, "n1", 29500, "deepspeed")),
    "deepspeed without the argument": (DEEPSPEED, None, Rendezvous(3, 1, 4, 2, "n1", 29500, "deepspeed")),
    "deepspeed with the argument only": (
        without(DEEPSPEED, "LOCAL_RANK", "CROSS_RANK"), 1, Rendezvous(3, 1, 4, 2, "n1", 29500, "deepspeed")),
    "torchrun": (TORCHRUN, None, Rendezvous(0, 0, 2, 2, "localhost", 40001, "torchrun")),
    "torchrun inside a slurm step": (
        {**SRUN, **TORCHRUN}, None, Rendezvous(0, 0, 2, 2, "localhost", 40001, "torchrun")),
    "one rank set by hand": (
        {"RANK": "0", "WORLD_SIZE": "1"}, None, Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "torchrun")),
    "srun": (SRUN, None, Rendezvous(2, 0, 3, 1, "n1", 25493, "srun")),
    "srun, first node": (
        {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, None,
        Rendezvous(1, 1, 3, 2, "n1", 25493, "srun")),
    "srun, second try of the job": (
        {**SRUN, "SLURM_RESTART_COUNT": "1"}, None, Rendezvous(2, 0, 3, 1, "n1", 24956, "srun")),
    "srun, second step of the job": ({**SRUN, "SLURM_STEP_ID": "1"}, None, Rendezvous(2, 0, 3, 1, "n1", 26264, "srun")),
    "srun with an address and port from the sbatch file": (
        {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7000"}, None,
        Rendezvous(2, 0, 3, 1, "10.0.0.1", 7000, "srun")),
    "srun with the world size from the sbatch file": (
        {**SRUN, "WORLD_SIZE": "3"}, None, Rendezvous(2, 0, 3, 1, "n1", 25493, "srun")),
    "a step on fewer tasks than the job": (
        {**SRUN, "SLURM_NTASKS": "8"}, None, Rendezvous(2, 0, 3, 1, "n1", 25493, "srun")),
    "a step that only tells the job's numbers": (
        {**without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
         "SLURM_JOB_NODELIST": "gpu-a07"}, None, Rendezvous(2, 0, 3, 3, "gpu-a07", 25493, "srun")),
    "a step of one task": ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None,
                           Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "srun")),
    "plain python": ({}, None, Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "python")),
    "plain python with --local_rank 0": ({}, 0, Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "python")),
    "plain python in an sbatch script": (SBATCH_SHELL, None, Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "python")),
    "plain python in an interactive allocation": (
        {**SBATCH_SHELL, "SLURM_STEP_ID": str(2**32 - 6)}, None, Rendezvous(0, 0, 1, 1, "127.0.0.1", 555, "python")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_a_process_finds_its_place(case):
    environment, arguments_local_rank, expected = FOUND[case]
    found = find(environment, arguments_local_rank)
    assert replace(found, job=None, start="a run") == expected


def test_a_process_knows_the_slurm_job_that_it_is_a_part_of():
    environment, *_ = FOUND["torchrun inside a slurm step"]
    assert find(environment).job == "1234"
    assert find({}).job is None


def test_neighbouring_jobs_their_steps_and_their_restarts_have_ports_of_their_own():
    ports = {
        rendezvous.port_of_step({"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart})
        for job in ("4711", "4712", "4713")
        for step in "0123"
        for restart in map(str, range(10))
    }
    assert len(ports) >= 118 and all(20000 <= port < 30000 for port in ports)  # of 120; by lot, so some may meet


def test_a_start_is_told_from_others_by_what_all_its_processes_know():
    starts = [
        find(environment).start
        for environment in (SRUN, {**SRUN, "SLURM_RESTART_COUNT": "2"}, {**SRUN, **TORCHRUN}, DEEPSPEED)
    ]
    assert starts == ["SLURM step 1234.0", "SLURM step 1234.0, restart 2", "torchrun's run none", "a run"]
    other_rank = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert find(other_rank).start == find(SRUN).start


REFUSED = {
    "RANK = 1 but WORLD_SIZE is not set": ({"RANK": "1"}, None),
    "WORLD_SIZE = 4 but RANK is not set": ({"WORLD_SIZE": "4"}, None),
    "RANK = 2 is not below WORLD_SIZE = 2": ({**TORCHRUN, "RANK": "2"}, None),
    "RANK = one is not a whole number from 0 up": ({**TORCHRUN, "RANK": "one"}, None),
    "RANK = -1 is not a whole number from 0 up": ({**TORCHRUN, "RANK": "-1"}, None),
    "WORLD_SIZE = 0 is not a whole number from 1 up": ({**TORCHRUN, "WORLD_SIZE": "0"}, None),
    "LOCAL_RANK = 2 is not below LOCAL_WORLD_SIZE = 2": ({**TORCHRUN, "LOCAL_RANK": "2"}, None),
    "LOCAL_WORLD_SIZE = 3 is above the number of all processes, 2": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, None),
    "LOCAL_RANK is not set; deepspeed, torchrun and srun set it": (without(TORCHRUN, "LOCAL_RANK"), None),
    "WORLD_SIZE = 2 but LOCAL_WORLD_SIZE is not set": (without(TORCHRUN, "LOCAL_WORLD_SIZE"), None),
    "MASTER_ADDR is not set": (without(TORCHRUN, "MASTER_ADDR"), None),
    "MASTER_PORT = http is not a whole number from 1 up": ({**TORCHRUN, "MASTER_PORT": "http"}, None),
    "MASTER_PORT = 70000 is not a port": ({**TORCHRUN, "MASTER_PORT": "70000"}, None),
    "LOCAL_RANK = 1 but --local_rank = 0": (DEEPSPEED, 0),
    "--local_rank = 1 but RANK is not set": ({}, 1),
    "SLURM_PROCID = 3 is not below SLURM_STEP_NUM_TASKS = 3": ({**SRUN, "SLURM_PROCID": "3"}, None),
    "WORLD_SIZE = 8 but srun started 3 tasks (SLURM_STEP_NUM_TASKS)": ({**SRUN, "WORLD_SIZE": "8"}, None),
    "SLURM_LOCALID = 1 is not below SLURM_STEP_TASKS_PER_NODE = 1": ({**SRUN, "SLURM_LOCALID": "1"}, None),
    "SLURM_STEP_TASKS_PER_NODE = 2,2 does not fit 3 tasks": ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2,2"}, None),
    "SLURM_STEP_TASKS_PER_NODE = many is not a list of task counts": (
        {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, None),
    "SLURM_STEP_TASKS_PER_NODE is not set in a step on several": (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), None),
    "SLURM_STEP_NODELIST = n[1-2 is not a list of hosts": ({**SRUN, "SLURM_STEP_NODELIST": "n[1-2"}, None),
    "SLURM_JOB_ID = x is not a whole number": ({**SRUN, "SLURM_JOB_ID": "x"}, None),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_contradiction_is_told_with_the_variable_and_its_value(message):
    with pytest.raises(Fault) as told:
        find(*REFUSED[message])
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],gpu-a[01-02]", ["n1", "n2", "n3", "n7", "gpu-a01", "gpu-a02"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]n[3,5]-ib", ["rack1n3-ib", "rack1n5-ib", "rack2n3-ib", "rack2n5-ib"]),
        ("a,b.example.org,c", ["a", "b.example.org", "c"]),
    ],
)
def test_a_slurm_host_list_is_written_out_in_order(hosts, expected):
    assert expand_hosts(hosts) == expected


@pytest.mark.parametrize("hosts", ["n[]", "n[3-1]", "n[a-b]", "n[1-2", "a,,b", "n1]", "two words"])
def test_a_host_list_that_makes_no_sense_is_refused(hosts):
    with pytest.raises(Fault, match="is not a list of hosts such as"):
        expand_hosts(hosts)


@pytest.mark.parametrize(
    ("counts", "expected"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3]), ("8(x1)", [8])]
)
def test_task_counts_are_written_out_by_node(counts, expected):
    assert expand_task_counts(counts) == expected


def test_all_tasks_of_a_step_meet_at_one_place():
    places = {
        find({**SRUN, "SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node})
        for rank, local, node in [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1")]
    }
    assert len({(place.master_address, place.master_port) for place in places}) == 1
    assert {place.rank for place in places} == {0, 1, 2}


@pytest.mark.parametrize(("num_visible_devices", "expected"), [(0, 0), (1, 0), (2, 1), (8, 1)])
def test_the_device_is_number_0_where_a_task_sees_only_its_own(num_visible_devices, expected):
    assert Rendezvous(3, 1, 4, 2, "n1", 29500, "srun").device_index(num_visible_devices) == expected


def test_more_processes_than_devices_are_refused():
    with pytest.raises(Fault, match="local rank 2 has no device: 4 processes run on this machine and 2 devices"):
        Rendezvous(2, 2, 4, 4, "n1", 29500, "srun").device_index(2)


def test_a_port_that_is_listened_on_is_not_free():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not rendezvous.is_port_free("127.0.0.1", port)
    assert rendezvous.is_port_free("127.0.0.1", port)


def test_an_address_of_another_machine_has_no_free_port_here():
    assert not rendezvous.is_port_free("192.0.2.1", 40000)  # an address reserved for examples


def test_a_picked_port_is_free_and_is_no_outgoing_connections():
    ports = {rendezvous.pick_free_port() for _ in range(20)}
    assert len(ports) > 10 and all(20000 <= port < 30000 for port in ports)
    assert rendezvous.is_port_free("127.0.0.1", ports.pop())


def test_where_those_are_all_taken_the_machine_gives_one(monkeypatch):
    monkeypatch.setattr(rendezvous, "is_port_free", lambda address, port: False)
    assert 0 < rendezvous.pick_free_port() < 65536


def test_a_machine_without_a_free_port_is_told_of(monkeypatch):
    def no_socket(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(rendezvous.socket, "socket", no_socket)
    with pytest.raises(Fault, match="this machine gives no free port .*Too many open files"):
        rendezvous.pick_free_port()
