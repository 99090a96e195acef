"""One way of making a step, in a process of its own that steps when it is told to: lines of JSON in and out.

    python -m cpt.benchmarks.step_process '{"way": "ours", "case": {...}, "device": "cpu"}'
        -> {"built": true}
    step -> {"seconds": 0.41, "loss": 7.6}                one step; on a CPU in CPU time of its one thread
    profile -> {"groups": {"matmuls": 0.2, ...}, ...}     one step, looked into
    memory -> {"peak_bytes": ...}

A process of its own, so that its peak of memory is its own, and what fails in it ends nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cpt.benchmarks import machine, step_profile
from cpt.benchmarks.step_ways import PROFILED, WAYS, Case, Step, Way

PROFILED_NAME = "profiled"


class Failed(RuntimeError):
    """The process of a way has ended; the message is the last line that it wrote."""


class StepProcess:
    """The other end: starts the process, waits until its way is built, tells it to step."""

    def __init__(self, way: str, case: Case, device: torch.device) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (until close)
        asked = json.dumps({"way": way, "case": vars(case), "device": device.type})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if device.type == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cpt.benchmarks.step_process", asked],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line that it gives. Raises Failed if there is none."""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = [one.strip() for one in self._errors.read().splitlines() if one.strip()]
            raise Failed(lines[-1] if lines else f"ended with status {self._process.returncode}")
        return json.loads(line)

    def ask(self, word: str) -> dict[str, Any]:
        """What it answers to `step`, `profile` or `memory`. Raises Failed if it has ended."""
        with contextlib.suppress(BrokenPipeError):  # why it ended is told by what follows
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Let it end."""
        with contextlib.suppress(BrokenPipeError):  # what has ended reads no more
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._errors.close()


def serve(way: Way, case: Case, words, say) -> None:
    """Build `way`, then do what `words` ask for; `say(answer)` is called for each."""
    with machine.alone() as mesh:
        torch.set_num_threads(1 if mesh.device.type == "cpu" else torch.get_num_threads())
        step = way.make(case, mesh)
        say({"built": True})
        for word in map(str.strip, words):
            if word == "step":
                say(_timed(step, mesh.device))
            elif word == "profile":
                say(step_profile.profiled(step, mesh.device))
            else:
                say({"peak_bytes": _peak_bytes(mesh.device)})


def _timed(step: Step, device: torch.device) -> dict[str, float]:
    is_gpu = device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    if is_gpu:
        torch.cuda.synchronize(device)
    began = clock()
    loss = step()
    if is_gpu:
        torch.cuda.synchronize(device)
    return {"seconds": clock() - began, "loss": loss}


def _peak_bytes(device: torch.device) -> int:
    """Of the GPU's memory what torch had taken at most; on a CPU the process's largest resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _main() -> None:
    asked = json.loads(sys.argv[1])
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    way = PROFILED if asked["way"] == PROFILED_NAME else WAYS[asked["way"]]
    serve(way, Case(**asked["case"]), sys.stdin, lambda answer: print(json.dumps(answer), file=answers))


if __name__ == "__main__":
    _main()
