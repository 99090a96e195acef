"""A function on N ranks: N forked processes that meet over gloo, in about a second, with nothing imported again.

    on_ranks(2, work)   ->   [work(mesh of rank 0), work(mesh of rank 1)]

What `work` returns must be tensors, numbers, text, and lists, tuples and dicts of them. The first rank that raises
decides the error that the test sees; the others are ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpt.parallel.mesh import Mesh, Settings, open_mesh
from cpt_launcher.rendezvous import pick_free_port

# Imported once, here, and not in every forked rank: together they take five seconds. The last four are imported by
# torch and DeepSpeed themselves, but only when the first engine is made.
for _module in ("cpt.train", "deepspeed", "torch._dynamo", "torch._inductor", "deepspeed.runtime.zero.stage3",
                "deepspeed.runtime.zero.muon.muon_optimizer"):  # fmt: skip
    importlib.import_module(_module)
torch.set_num_threads(1)
# Or DeepSpeed asks a program called numactl for the number of devices, in every step of stage 3.
os.environ["LOCAL_SIZE"] = "1"
# And it collects garbage nine times for each bf16 engine; what is here before the fork need not be looked at.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # or Triton's library tells of leaks at the end

SECONDS = 60.0


class RankError(AssertionError):
    """A rank raised, died or did not end; its traceback is the message."""


def on_ranks(number: int, work: Callable[[Mesh], Any], seconds: float = SECONDS, **axes: int) -> list[Any]:
    """The results of `work(mesh)` on ranks 0 to number - 1, in order; `axes` are those of the mesh's settings.

    Raises RankError with the traceback of the first rank that failed, or when they have not ended in `seconds`.
    """
    port = pick_free_port()

    def on_one(rank: int) -> Any:
        settings = Settings(timeout_seconds=int(seconds), **axes)
        # As many ranks here as there are cores: one thread each, the same sums whatever the machine.
        place = {"rank": rank, "size": number, "local_rank": rank, "local_size": os.cpu_count() or 1}
        with open_mesh(settings, **place, address="127.0.0.1", port=port) as mesh:
            return work(mesh)

    return in_processes([lambda rank=rank: on_one(rank) for rank in range(number)], seconds)


def in_processes(works: list[Callable[[], Any]], seconds: float = SECONDS) -> list[Any]:
    """The results of these functions, each in a forked process of its own, all at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(work, Path(folder), number) for number, work in enumerate(works)]
        statuses = _wait(children, Path(folder), seconds)
        errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RankError(f"{errors[0].stem} of {len(works)}:\n{errors[0].read_text(encoding='utf-8')}")
        if any(status != 0 for status in statuses):
            raise RankError(f"ended with {statuses}: {'not in time' if None in statuses else 'a process died'}")
        return [torch.load(Path(folder) / f"process-{n}.result", weights_only=True) for n in range(len(works))]


def _fork(work: Callable[[], Any], folder: Path, number: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        # Threads that a test had started here are lost in the child, which would wait for them for ever.
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        result = work()
        torch.save(result, folder / f"process-{number}.result")
        status = 0
    except BaseException:
        aside = folder / f"process-{number}.aside"
        aside.write_text(traceback.format_exc(), encoding="utf-8")
        aside.rename(folder / f"process-{number}.error")
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(locals().get("status", 1))  # pytest's own endings are the parent's


def _wait(children: list[int], folder: Path, seconds: float) -> list[int | None]:
    """The exit status of each child; None for one that was killed because its time was up."""
    deadline = time.monotonic() + seconds
    statuses: dict[int, int | None] = {}
    grace: float | None = None
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) and grace is None:
            grace = time.monotonic() + 2.0  # the others wait for one that is gone; let them say so first
        if time.monotonic() > min(deadline, grace or deadline):
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    statuses[child] = None
        time.sleep(0.005)
    return [statuses[child] for child in children]
