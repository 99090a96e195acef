"""The ways of saving that `cpt bench checkpoint` compares: the same masters and moments of one engine, onto the disk.

Every way ends with the files on the disk (fsync), not in the page cache; what a library leaves there is synced after.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp

from cpt.checkpoint import Checkpoint, Saver
from cpt.engine import Engine
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import MOMENTS

_DD_BLOCK = 8 << 20


@dataclass(frozen=True)
class Save:
    """One save: seconds that training waits for, until all is on the disk, and of CPU; bytes that lie there."""

    blocking: float
    total: float
    cpu: float
    num_bytes: int


class _Clock:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._began, self._cpu_began, self._copied = time.perf_counter(), _cpu_seconds(), None

    def copied(self) -> None:
        """Training could go on from here."""
        self._copied = time.perf_counter() - self._began

    def done(self, folder: Path) -> Save:
        """The save of what lies in `folder` by now, once it is synced."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        total, cpu = time.perf_counter() - self._began, _cpu_seconds() - self._cpu_began
        return Save(self._copied or total, total, cpu, sum(file.stat().st_size for file in files))


@dataclass(frozen=True)
class Way:
    """`save(folder)` into a new folder; `load(folder)` reads it back into the engine, None where nothing is read."""

    name: str
    save: Callable[[Path], Save]
    load: Callable[[Path], object] | None = None


def ways(engine: Engine, mesh: Mesh, with_peers: bool = True) -> list[Way]:
    """All of them. `engine` is on one rank; every way has memory and threads of its own and keeps them."""
    saver = Saver(mesh)
    tensors = {f"{piece.name}/master": piece.values for piece in engine.masters.pieces}
    for moment in MOMENTS:
        tensors.update({f"{piece.name}/{moment}": piece.moments[moment] for piece in engine.masters.pieces})
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def dd(folder: Path) -> Save:
        clock = _Clock()
        blocks = f"count={-(-num_bytes // _DD_BLOCK)}"
        command = ["dd", "if=/dev/zero", f"of={folder / 'file'}", "oflag=direct", f"bs={_DD_BLOCK}", blocks]
        subprocess.run([*command, "conv=fsync"], check=True, stderr=subprocess.DEVNULL)
        return clock.done(folder)

    def ours(folder: Path, copies: bool) -> Save:
        clock = _Clock()
        saver.begin(folder / "step-1", engine.content({}), copies=copies)
        if copies:
            clock.copied()
        ended = saver.wait()
        assert ended.failure is None, ended.failure
        return clock.done(folder)

    def load_ours(folder: Path) -> None:
        engine.load(Checkpoint(folder / "step-1"), with_optimizer=True, with_methods=True)

    def torch_waiting(folder: Path) -> Save:
        clock = _Clock()
        dcp.save(tensors, checkpoint_id=folder)
        return clock.done(folder)

    def torch_async(folder: Path) -> Save:
        clock = _Clock()
        future = dcp.async_save(tensors, checkpoint_id=folder)
        clock.copied()
        future.result()
        return clock.done(folder)

    def deepspeed(folder: Path) -> Save:
        clock = _Clock()
        engine._engine.save_checkpoint(str(folder), tag="it")
        return clock.done(folder)

    own = [
        Way("dd oflag=direct bs=8M", dd),
        Way("ours, training waits", lambda folder: ours(folder, False), load_ours),
        Way("ours, in the background", lambda folder: ours(folder, True)),
    ]
    peers = [
        Way(
            "torch.distributed.checkpoint save", torch_waiting,
            lambda folder: dcp.load(tensors, checkpoint_id=folder),
        ),
        Way("torch.distributed.checkpoint async_save", torch_async),
        Way(
            "DeepSpeed save_checkpoint", deepspeed,
            lambda folder: engine._engine.load_checkpoint(str(folder), tag="it"),
        ),
    ]  # fmt: skip
    return own + (peers if with_peers else [])


def seconds_to_load(way: Way, folder: Path) -> float:
    """Seconds to read back what `way` has saved, from the disk."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:  # what was just written may still be in the page cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    way.load(folder)
    return time.perf_counter() - began


def empty(folder: Path) -> Path:
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _cpu_seconds() -> float:
    """Of all threads and of the processes that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime
