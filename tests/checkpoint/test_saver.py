"""Written in the background, a checkpoint holds what was there when it was begun; a save that fails leaves nothing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint, Content, Saver, save, write
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Piece

NUMBER = 5001  # elements of a rank


def content(mesh: Mesh, note: int) -> Content:
    """Two kinds of one parameter that is cut over the ranks, and a method's odd one in bf16 on the first rank."""
    values = torch.arange(NUMBER, dtype=torch.float32) + note + 10_000 * mesh.rank
    start = mesh.rank * NUMBER
    pieces = [Piece("weight", (mesh.size, NUMBER), start, start + NUMBER, values, {})]
    halves = [torch.ones(NUMBER, dtype=torch.bfloat16) * note]
    return Content(pieces, {"method/x/half": halves, "master": [values], "exp_avg": [values * 2]}, {"note": note})


def held_content(folder: Path) -> list:
    """What a checkpoint holds, to be compared."""
    checkpoint = Checkpoint(folder)
    return [checkpoint.state["note"], *(checkpoint.read(kind, "weight") for kind in checkpoint.kinds)]


def expected(size: int, note: int) -> list:
    values = torch.cat([torch.arange(NUMBER) + note + 10_000.0 * rank for rank in range(size)])
    return [note, values * 2, values, torch.full((size * NUMBER,), float(note))]


def assert_holds(folder: Path, size: int, note: int) -> None:
    for found, wanted in zip(held_content(folder), expected(size, note), strict=True):
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted


def held_back(patch, hold: threading.Event) -> None:
    """Let the thread wait before it writes."""
    really = write.Part.write

    def late(*arguments):
        assert hold.wait(20)
        really(*arguments)

    patch.setattr(write.Part, "write", late)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_holds_what_was_there_when_it_was_begun_whatever_comes_after(tmp_path, monkeypatch, ranks):
    def work(mesh):
        hold, told = threading.Event(), []
        held_back(monkeypatch, hold)
        with Saver(mesh) as saver:
            first = content(mesh, 1)
            assert saver.begin(tmp_path / "step-1", first, lambda: told.append("then"), copies=True) is None
            first.pieces[0].values.fill_(-1.0)
            first.tensors["exp_avg"][0].fill_(-1.0)
            assert [saver.poll() for _ in range(5)] == [None] * 5 and saver.is_pending
            assert not (tmp_path / "step-1").exists()
            hold.set()
            ended = saver.wait()
            assert ended.failure is None and not saver.is_pending and saver.poll() is None and saver.wait() is None
            assert told == (["then"] if mesh.is_first else [])
            memory = saver._memory.data_ptr()
            saver.begin(tmp_path / "step-2", content(mesh, 2), copies=True)
            while saver.poll() is None:
                pass
            assert saver._memory.data_ptr() == memory, "the memory is used again"

    on_ranks(ranks, work, seconds=40)
    for note in (1, 2):
        assert_holds(tmp_path / f"step-{note}", ranks, note)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def fill_disk(patch, tmp_path: Path) -> str:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "pwrite", full)
    return "pieces-0000{rank}.safetensors: No space left on device"


def limit_files(patch, tmp_path: Path) -> str:
    """No pretence: the system refuses."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    return "pieces-0000{rank}.safetensors: File too large"


def lose_memory(patch, tmp_path: Path) -> str:
    def fail(*_):
        raise MemoryError("no more")

    patch.setattr(write.Part, "write", fail)
    return "MemoryError: no more"


def refuse_copy(patch, tmp_path: Path) -> str:
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    patch.setattr(Saver, "_image", fail)
    return "can't allocate memory"


def refuse_memory(patch, tmp_path: Path) -> str:
    def fail(*_):
        raise MemoryError("Unable to allocate 2.00 TiB for an array")

    patch.setattr(save, "memory_for", fail)
    patch.setattr(save, "fill", fail)  # the memory of the save before would do
    return "MemoryError: Unable to allocate"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("harm", [fill_disk, limit_files, lose_memory, refuse_copy, refuse_memory])
def test_a_rank_that_fails_is_told_to_all_and_the_one_before_stands(tmp_path, monkeypatch, harm, rank):
    def work(mesh):
        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), copies=True)
            assert saver.wait().failure is None
            told = ""
            if mesh.rank == rank:
                told = harm(monkeypatch, tmp_path)
            assert saver.begin(tmp_path / "step-2", content(mesh, 2), copies=True) is None
            failure = saver.wait().failure
            assert told.format(rank=rank) in failure and not saver.is_pending
            return failure

    failures = on_ranks(2, work, seconds=40)
    assert failures[0] == failures[1] and failures[0].startswith(f"rank {rank}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]
    assert_holds(tmp_path / "step-1", 2, 1)


def test_a_folder_that_somebody_deletes_meanwhile_fails_the_save(tmp_path, monkeypatch):
    def work(mesh):
        hold = threading.Event()
        held_back(monkeypatch, hold)
        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), copies=True)
            shutil.rmtree(tmp_path / ".step-1.aside")
            hold.set()
            return saver.wait().failure

    (failure,) = on_ranks(1, work)
    assert failure == f"rank 0: {tmp_path}/.step-1.aside/pieces-00000.safetensors: No such file or directory"
    assert list(tmp_path.iterdir()) == []


def test_after_a_failure_the_next_save_is_written(tmp_path, monkeypatch):
    def work(mesh):
        with Saver(mesh) as saver:
            with monkeypatch.context() as patch:
                if mesh.rank == 1:
                    fill_disk(patch, tmp_path)
                saver.begin(tmp_path / "step-1", content(mesh, 1), copies=True)
                assert saver.wait().failure
            saver.begin(tmp_path / "step-2", content(mesh, 2), copies=True)
            assert saver.wait().failure is None

    on_ranks(2, work, seconds=40)
    assert_holds(tmp_path / "step-2", 2, 2)


@pytest.mark.parametrize("what", ["pieces-00001.safetensors", "index-00001.json"])
def test_a_part_that_is_gone_before_the_parts_are_joined_fails_the_save(tmp_path, monkeypatch, what):
    def work(mesh):
        really = save.join_parts

        def join(aside, *others):
            (aside / what).unlink()
            really(aside, *others)

        monkeypatch.setattr(save, "join_parts", join)
        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), copies=True)
            return saver.wait().failure

    failures = on_ranks(2, work, seconds=40)
    assert failures[0] == failures[1] and f"{what}: No such file or directory" in failures[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_room_for_all_ranks_nothing_is_written(tmp_path, monkeypatch, ranks):
    num_bytes = ranks * 2 * NUMBER * (4 + 1)  # and the headers: so this much is not enough

    def work(mesh):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": num_bytes})())
        with Saver(mesh) as saver:
            ended = saver.begin(tmp_path / "here" / "step-1", content(mesh, 1), copies=True)
            assert not saver.is_pending
            return ended.failure

    failures = on_ranks(ranks, work, seconds=40)
    assert len(set(failures)) == 1
    assert f"rank 0: {tmp_path}/here: " in failures[0]
    assert f"bytes are needed and {num_bytes:,} are free on this disk; nothing was written" in failures[0]
    assert list((tmp_path / "here").iterdir()) == []


def test_a_file_in_place_of_the_folder_is_told_by_all_ranks(tmp_path):
    (tmp_path / "checkpoints").write_text("")

    def work(mesh):
        with Saver(mesh) as saver:
            return saver.begin(tmp_path / "checkpoints" / "step-1", content(mesh, 1), copies=True).failure

    failures = on_ranks(2, work, seconds=40)
    assert failures[0] == failures[1] and f"rank 0: {tmp_path}/checkpoints: " in failures[0]


def test_what_was_closed_before_it_ended_never_appears_and_the_next_save_clears_it_away(tmp_path):
    def work(mesh):
        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), copies=True)
        left = sorted(path.name for path in tmp_path.iterdir())
        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-2", content(mesh, 2), copies=False)
            saver.wait()
        return left

    assert on_ranks(1, work)[0] == [".step-1.aside"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2"]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied", "latest"), ValueError("not in list")])
def test_what_fails_after_it_has_appeared_is_told_apart_on_all_ranks(tmp_path, error):
    def work(mesh):
        def fail():
            raise error

        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), fail, copies=True)
            ended = saver.wait()
            saver.begin(tmp_path / "step-2", content(mesh, 2), copies=True)
            assert saver.wait() == replace(ended, folder=tmp_path / "step-2", seconds=ANY, failure=None, is_there=True)
            return ended.is_there, ended.failure

    told = "latest: Permission denied" if isinstance(error, OSError) else "ValueError: not in list"
    assert on_ranks(2, work, seconds=40) == [(True, f"rank 0: {told}")] * 2
    assert_holds(tmp_path / "step-1", 2, 1)


def test_one_whose_name_is_perhaps_not_on_the_disk_yet_is_there_and_what_follows_is_left_to_the_next(
    tmp_path, monkeypatch
):
    """The disk fails when the folder around it is to be written, which holds the new name."""

    def work(mesh):
        really, told = os.fsync, []

        def fail(handle):
            if Path(f"/proc/self/fd/{handle}").readlink() == tmp_path:
                raise OSError(errno.EIO, "Input/output error")
            really(handle)

        with Saver(mesh) as saver:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                saver.begin(tmp_path / "step-1", content(mesh, 1), lambda: told.append(1), copies=True)
                ended = saver.wait()
            saver.begin(tmp_path / "step-2", content(mesh, 2), lambda: told.append(2), copies=True)
            assert saver.wait().failure is None
            return ended.is_there, ended.failure, told

    of_ranks = on_ranks(2, work, seconds=40)
    failure = f"rank 0: {tmp_path}: Input/output error"
    assert of_ranks == [(True, failure, [2]), (True, failure, [])]
    assert_holds(tmp_path / "step-1", 2, 1)


def test_one_of_the_same_name_goes_only_when_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    def work(mesh):
        really = Path.replace

        def refuse(path, target):
            if path.name == ".step-1.aside":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return really(path, target)

        with Saver(mesh) as saver:
            saver.begin(tmp_path / "step-1", content(mesh, 1), copies=False)
            assert saver.wait().failure is None
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", refuse)
                saver.begin(tmp_path / "step-1", content(mesh, 2), copies=False)
                ended = saver.wait()
            assert "Input/output error" in ended.failure and not ended.is_there
            assert_holds(tmp_path / "step-1", 1, 1)
            saver.begin(tmp_path / "step-1", content(mesh, 3), copies=False)
            assert saver.wait().failure is None

    on_ranks(1, work)
    assert_holds(tmp_path / "step-1", 1, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
