"""Before the first step: do all ranks run the same code on the same settings, and do they compute and add up rightly?

    every rank   versions, hashes of code and settings, clock, room on the disk; a product of matrices and a sum over
                 ranks, both in whole numbers, which have one right answer
    together     all learn what all have; each finds the same faults, and the first rank tells them

A machine that computes wrongly, or a checkout that was not updated everywhere, shows as a bad loss weeks later.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

import cpt
from cpt.config import Fault
from cpt.parallel.mesh import Mesh
from cpt.parallel.reports import (
    Report,
    differing_settings,
    faults_between,
    odd_clocks,
    odd_disks,
    slow_ranks,
    summary,
)
from cpt.parallel.together import alike

_log = logging.getLogger(__name__)

_PACKAGES = "cpt", "cpt_kernels", "cpt_launcher"  # which need not lie in one checkout
_WIDTH_ON_CPU, _WIDTH_ON_GPU = 384, 4096  # of the matrices
_NUM_PRODUCTS = 5
_NUM_SUMMED = 1 << 18  # numbers


@dataclass(frozen=True)
class Settings:
    """`slow_factor`: a rank is slow whose matrices take that many times as long as the median rank's.

    `slow_ranks`: what to do about it. `clock_seconds`: warn of clocks that differ by more from the median.
    """

    slow_factor: float = 2.0
    slow_ranks: Literal["warn", "refuse"] = "warn"
    clock_seconds: float = 5.0

    def faults(self) -> list[str]:
        """A rank slower than itself, no difference at all."""
        faults = [] if self.slow_factor > 1 else [f"slow_factor = {self.slow_factor:g}: above 1"]
        return faults + ([] if self.clock_seconds > 0 else [f"clock_seconds = {self.clock_seconds:g}: above 0"])


def check_health(mesh: Mesh, settings: Settings, run: Any, output: Path, num_bytes: int) -> None:
    """Tell what differs between ranks or is wrong on one; a line at info if all is well. All ranks call it.

    `run`: everything that was read from files and words, as plain mappings. `num_bytes`: of a checkpoint in `output`.

    Raises a passing Fault on the first rank, and OtherRankError on the others, for what would spoil the run.
    """
    here = report_of(mesh, run, output)
    of_ranks = [Report(**json.loads(text)) for text in mesh.texts(json.dumps(asdict(here)))]
    lines = faults_between(of_ranks)
    if len({report.settings for report in of_ranks}) > 1:
        lines += differing_settings([json.loads(text) for text in mesh.texts(_text(run))], of_ranks)
    slow = slow_ranks(of_ranks, settings.slow_factor)
    if settings.slow_ranks == "refuse":
        lines += slow
    with alike(mesh):
        if lines:
            raise Fault(lines, is_passing=True)  # of a machine, and the next start may have others
    if mesh.is_first:
        for line in slow + odd_clocks(of_ranks, settings.clock_seconds) + odd_disks(of_ranks, num_bytes, output):
            _log.warning("%s", line)
        _log.info("%s", summary(of_ranks, 2 * _width_on(mesh.device) ** 3, 4 * _NUM_SUMMED))


# ---- on one rank


def report_of(mesh: Mesh, run: Any, output: Path) -> Report:
    """This rank's report."""
    product_seconds, wrong_product = timed_product(mesh.device)
    sum_seconds, wrong_sum = timed_sum(mesh)
    clock = time.time()  # all ranks come out of the sum at the same moment
    return Report(
        socket.gethostname(),
        versions(),
        hash_of_code(folders_of_code()),
        xxhash.xxh3_64(_text(run).encode()).hexdigest(),
        clock,
        room_at(output),
        product_seconds,
        sum_seconds,
        wrong_product or wrong_sum,
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    try:
        of_deepspeed = version("deepspeed")
    except PackageNotFoundError:
        of_deepspeed = "unknown"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": of_deepspeed,
        "cpt": cpt.__version__,
    }


def folders_of_code() -> list[Path]:
    """Where the packages of cpt lie that are installed here; none is imported for it."""
    found = [importlib.util.find_spec(name) for name in _PACKAGES]
    return [Path(folder) for spec in found if spec for folder in spec.submodule_search_locations or ()]


def hash_of_code(packages: Sequence[Path]) -> str:
    """Of the Python files of these folders, their names and what is in them."""
    digest = xxhash.xxh3_64()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def room_at(output: Path) -> int:
    """Bytes that are free on the disk where `output` lies, or will lie."""
    return shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free


def timed_product(device: torch.device) -> tuple[float, str | None]:
    """Seconds of a product of two matrices, the best of a few, and what is wrong with it, None if nothing is.

    In small whole numbers, of which every order of sums gives the same; held against sums of its rows and columns.
    """
    width = _width_on(device)
    places = torch.arange(width * width, device=device).view(width, width)
    left, right = ((places * factor % 17 - 8).float() for factor in (7, 11))
    seconds = []
    for _ in range(_NUM_PRODUCTS):
        began = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    exact_left, exact_right, exact = left.double(), right.double(), product.double()
    for name, found, expected in (
        ("row", exact.sum(dim=1), exact_left @ exact_right.sum(dim=1)),
        ("column", exact.sum(dim=0), exact_left.sum(dim=0) @ exact_right),
    ):
        if len(wrong := (found != expected).nonzero()):
            at = int(wrong[0])
            told = f"{name} {at} of a product of matrices sums to {found[at]:.0f} instead of {expected[at]:.0f}"
            return min(seconds), told
    return min(seconds), None


def timed_sum(mesh: Mesh) -> tuple[float, str | None]:
    """Seconds of a sum over all ranks, and what is wrong with it, None if nothing is."""
    numbers = torch.arange(_NUM_SUMMED, device=mesh.device, dtype=torch.float32) % 1024
    mesh.sum(numbers + mesh.rank)
    mesh.wait()
    began = time.perf_counter()
    total = mesh.sum(numbers + mesh.rank).cpu()
    seconds = time.perf_counter() - began
    expected = (numbers.cpu() * mesh.size) + mesh.size * (mesh.size - 1) // 2
    if len(wrong := (total != expected).nonzero()):
        at = int(wrong[0])
        return seconds, f"number {at} of a sum over ranks is {total[at]:.0f} instead of {expected[at]:.0f}"
    return seconds, None


def _width_on(device: torch.device) -> int:
    return _WIDTH_ON_GPU if device.type == "cuda" else _WIDTH_ON_CPU


def _text(run: Any) -> str:
    return json.dumps(run, sort_keys=True, default=str)
