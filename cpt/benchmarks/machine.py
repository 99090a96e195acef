"""What a benchmark ran on: processor, versions; and a way to use one core of it alone."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cpt.parallel.mesh import Mesh, Settings, open_mesh


def device_of(name: str) -> torch.device:
    """`auto`: the first GPU, the CPU where there is none or DeepSpeed was told to stay there."""
    has_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device(("cuda" if has_gpu else "cpu") if name == "auto" else name)


def processor(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def system() -> str:
    """Version of Python, and the system."""
    return f"Python {platform.python_version()}, {platform.system()}"


def today() -> str:
    """The day by UTC, such as 2026-11-21."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def versions(*packages: str) -> dict[str, str]:
    """Those that are installed, with their versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def alone() -> Iterator[Mesh]:
    """A mesh of this process, which nobody else can join: torch finds a free port to meet itself at."""
    with open_mesh(Settings(), rank=0, size=1, local_rank=0, local_size=1, address="127.0.0.1", port=0) as mesh:
        yield mesh


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_core() -> Iterator[None]:
    """This process and its children on one core, with one thread in each library that asks."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with one_thread():
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        try:
            yield
        finally:
            if cores:
                os.sched_setaffinity(0, cores)
