"""What differs between ranks, or is wrong on one, is told before the first step, with rank and machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpt_harness.ranks import on_ranks

from cpt.config import Fault
from cpt.parallel import health
from cpt.parallel.mesh import ALONE, Mesh
from cpt.parallel.together import OtherRankError

RUN = {"seed": 1, "batch": {"windows": 8}}


def told_on(
    number: int,
    patch: Callable[[int], None],
    run: Callable[[int], Any] = lambda rank: RUN,
    num_bytes: int = 0,
    **more: Any,
) -> list[list[str]]:
    """What each rank raises, or warns of and says, when ranks check one another after `patch(rank)`."""

    def work(mesh: Mesh) -> list[str]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
        logging.getLogger("cpt").addHandler(handler)
        logging.getLogger("cpt").setLevel(logging.INFO)
        health.socket.gethostname = lambda: f"n{mesh.rank}"
        # Of a machine that does other things too, nothing is to be learned about speed.
        settings = health.Settings(**{"slow_factor": 1000.0, **more})
        patch(mesh.rank)
        try:
            health.check_health(mesh, settings, run(mesh.rank), Path("/tmp"), num_bytes)
        except Fault as fault:
            return list(fault.lines)
        except OtherRankError as error:
            return [f"other rank, status {error.status}"]
        return lines

    return on_ranks(number, work)


def nothing(rank: int) -> None:
    pass


def test_when_all_is_well_the_first_rank_says_so_in_a_line_and_the_others_nothing():
    (line,), others = told_on(2, nothing)
    assert line.startswith(
        "INFO checked 2 ranks on 2 machines: same code, settings and versions; products are right, at "
    )
    assert others == []


def test_a_process_by_itself_checks_its_machine(caplog):
    with caplog.at_level("INFO"):
        health.check_health(ALONE, health.Settings(), RUN, Path("/tmp"), 0)
    assert "checked this machine: products are right" in caplog.text


def test_the_check_is_short():
    began = time.monotonic()
    health.report_of(ALONE, RUN, Path("/tmp"))
    assert time.monotonic() - began < 20  # half a second where nothing else runs


def test_other_code_other_versions_and_wrong_products_are_told_at_once():
    def patch(rank: int) -> None:
        if rank == 1:
            health.hash_of_code = lambda packages: "beef"
            really = health.versions
            health.versions = lambda: {**really(), "torch": "1.0"}
            health.timed_product = lambda device: (0.001, "row 3 of a product of matrices sums to 5 instead of 4")

    lines, other = told_on(2, patch)
    assert other == ["other rank, status 1"]
    assert lines[0] == (
        "rank 1 on n1: row 3 of a product of matrices sums to 5 instead of 4; its processor, its memory or its network "
        "is faulty: leave the machine out, and have it tested"
    )
    assert lines[1] == (
        f"rank 1 on n1: torch 1.0, but {torch.__version__} on rank 0 on n0; install the same on all machines"
    )
    assert lines[2].startswith("rank 1 on n1: cpt's code with hash beef, but ")
    assert len(lines) == 3


def test_the_kernels_and_the_launcher_are_cpts_code_too(tmp_path):
    folders = health.folders_of_code()
    assert [folder.name for folder in folders] == ["cpt", "cpt_kernels", "cpt_launcher"]
    assert all((folder / "__init__.py").is_file() for folder in folders)
    for name in ("cpt", "cpt_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text("")
    here = [tmp_path / "cpt", tmp_path / "cpt_kernels"]
    before = health.hash_of_code(here)
    assert health.hash_of_code(here) == before
    (tmp_path / "cpt_kernels" / "one.py").write_text("x = 1")
    assert health.hash_of_code(here) != before


def test_settings_that_differ_are_named_with_both_values():
    lines, other = told_on(2, nothing, lambda rank: {"seed": 1, "batch": {"windows": 8 + rank}})
    assert lines == [
        "rank 1 on n1: batch.windows = 9, but 8 on rank 0 on n0; give all ranks the same files and the same words"
    ]
    assert other == ["other rank, status 1"]


def test_a_clock_that_is_off_is_warned_of():
    def patch(rank: int) -> None:
        really = time.time
        health.time.time = lambda: really() + 100 * (rank == 2)

    first, *others = told_on(3, patch, clock_seconds=30.0)
    assert first[0].startswith("WARNING rank 2 on n2: its clock is 100 s fast (health.clock_seconds = 30)")
    assert len(first) == 2 and others == [[], []]


def slow(rank: int) -> None:
    health.timed_product = lambda device: (0.030 if rank == 1 else 0.010, None)


def test_a_slow_rank_is_warned_of():
    first, _ = told_on(2, slow, slow_factor=2.0)
    assert first[0].startswith(
        "WARNING rank 1 on n1 is slow: its matrices take 30.0 ms, those of the median rank 10.0 ms"
    )


def test_a_slow_rank_is_refused_where_that_is_asked_for():
    first, other = told_on(2, slow, slow_factor=2.0, slow_ranks="refuse")
    assert first[0].startswith("rank 1 on n1 is slow") and other == ["other rank, status 1"]


def test_a_machine_that_lacks_room_where_the_first_has_it_is_warned_of():
    def patch(rank: int) -> None:
        health.room_at = lambda output: 10**9 if rank == 1 else 10**12

    first, _ = told_on(2, patch, num_bytes=10**11)
    assert first[0].startswith("WARNING rank 1 on n1 has 1.0 GB of room at /tmp, less than a checkpoint of 100.0 GB")


def test_a_product_with_one_wrong_number_is_found(monkeypatch):
    really = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = really(left, right)
        if product.dtype == torch.float32 and product.dim() == 2:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    _, told = health.timed_product(torch.device("cpu"))
    assert told.startswith("row 3 of a product of matrices sums to ")


def test_a_sum_with_one_wrong_number_is_found():
    def work(mesh: Mesh) -> str:
        really = Mesh.sum

        def wrong(mesh: Mesh, tensor: torch.Tensor) -> torch.Tensor:
            total = really(mesh, tensor)
            total[7] += mesh.rank
            return total

        Mesh.sum = wrong
        return health.timed_sum(mesh)[1] or ""

    assert on_ranks(2, work) == ["", "number 7 of a sum over ranks is 16 instead of 15"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"slow_factor": 1.0}, "slow_factor = 1: above 1"),
        ({"clock_seconds": 0.0}, "clock_seconds = 0: above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, fault):
    assert health.Settings(**settings).faults() == [fault]
