"""Ranks go on from one checkpoint, whatever each of them sees of the folder, and look through it together."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import read, write
from cpt.checkpoint.read import find_checkpoint
from cpt.config import Fault


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 5 and 10 of two ranks."""
    folder = tmp_path_factory.mktemp("saved")

    def work(mesh):
        engine = tiny.start_engine(mesh)
        for step in (5, 10):
            engine.save(folder / f"step-{step:08d}", {"note": step})

    on_ranks(2, work)
    return folder


def notes(saved: Path, before=lambda mesh: None, ranks: int = 2) -> list:
    """On each rank the step that it goes on from, or what it is told."""

    def work(mesh):
        before(mesh)
        try:
            return find_checkpoint(saved, mesh=mesh).state["note"]
        except Fault as fault:
            return fault.lines

    return on_ranks(ranks, work)


def test_a_rank_that_does_not_see_the_newest_goes_on_from_what_the_first_one_sees(saved):
    def blind(mesh):
        if mesh.rank == 1:
            read.checkpoint_folders = lambda folder: write.checkpoint_folders(folder)[:-1]

    assert notes(saved, blind) == [10, 10]


def test_what_one_rank_finds_damaged_none_goes_on_from(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "x"))
    pieces = folder / "step-00000010" / "pieces-00001.safetensors"
    content = bytearray(pieces.read_bytes())
    content[-1] ^= 1
    pieces.write_bytes(content)
    assert notes(folder) == [5, 5]
    shutil.rmtree(folder / "step-00000005")
    told = notes(folder)
    assert told[0] == told[1] and "pieces-00001.safetensors has changed since it was written" in told[0][1]


def test_a_disk_that_cannot_read_a_file_is_told_and_the_one_before_is_used(saved, caplog):
    def breaks(mesh):
        whole = read.damaged_files.__globals__["checksum"]

        def checksum(path, *more):
            if path.name == "pieces-00000.safetensors" and path.parent.name == "step-00000010":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return whole(path, *more)

        read.damaged_files.__globals__["checksum"] = checksum

    assert notes(saved, breaks) == [5, 5]


@pytest.mark.parametrize("other_is_damaged", [False, True])
def test_that_may_pass_which_some_rank_cannot_read_and_no_rank_finds_damaged(saved, tmp_path, other_is_damaged):
    """The first rank reads the first and the third of four files through, the second one the others."""
    folder = Path(shutil.copytree(saved, tmp_path / "x"))
    shutil.rmtree(folder / "step-00000005")
    if other_is_damaged:
        pieces = folder / "step-00000010" / "pieces-00000.safetensors"
        pieces.write_bytes(pieces.read_bytes()[:-1] + b"?")

    def work(mesh):
        give = read.damaged_files.__globals__["checksum"]

        def checksum(path, *more):
            if path.name == "pieces-00001.safetensors":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return give(path, *more)

        read.damaged_files.__globals__["checksum"] = checksum
        with pytest.raises(Fault) as found:
            find_checkpoint(folder, mesh=mesh)
        return [found.value.is_passing, len(found.value.lines)]

    assert on_ranks(2, work) == [[not other_is_damaged, 3 if other_is_damaged else 2]] * 2


def test_each_file_is_read_through_by_one_rank(saved):
    def count(mesh):
        seen = []
        whole = read.damaged_files.__globals__["checksum"]
        read.damaged_files.__globals__["checksum"] = lambda path, *more: seen.append(path.name) or whole(path, *more)
        find_checkpoint(saved, mesh=mesh)
        return seen

    one, other = on_ranks(2, count)
    assert sorted(one + other) == ["index.json", "pieces-00000.safetensors", "pieces-00001.safetensors", "state.json"]
    assert one and other


def test_a_checkpoint_that_was_closed_holds_no_file_open(saved):
    checkpoint = find_checkpoint(saved)
    before = checkpoint.weights()
    mapped = lambda: Path("/proc/self/maps").read_text().count(str(checkpoint.folder))  # noqa: E731
    assert mapped() > 0
    checkpoint.close()
    assert mapped() == 0
    assert checkpoint.weights().keys() == before.keys()


def test_what_each_rank_says_reaches_all():
    def work(mesh):
        return [mesh.texts(["", "häh\n", "three"][mesh.rank]), mesh.from_first([mesh.rank, -7]), mesh.texts("")]

    assert on_ranks(3, work) == [[["", "häh\n", "three"], [0, -7], ["", "", ""]]] * 3
