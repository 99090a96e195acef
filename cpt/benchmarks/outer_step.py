"""Make Reptile's outer step beside steps of training, in turn: CPU time, and what it adds to a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from cpt.benchmarks.checkpoint import engine_of, stepper
from cpt.benchmarks.machine import alone, one_core, processor, system, today, versions
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.options import option
from cpt.methods import reptile
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress

_CALLS = 1000  # of a method that only counts, which takes microseconds


@dataclass(frozen=True)
class Settings:
    """Of a Llama in bf16 under ZeRO 1."""

    parameters: int = option(20_000_000, "at least, of the model")
    length: int = option(1024, "tokens of a step")
    every: int = option(500, "steps in a window")
    repetitions: int = option(9, "turns")

    def faults(self) -> list[str]:
        """Nothing to measure."""
        least = {"parameters": 1, "length": 2, "every": 1, "repetitions": 1}
        return [f"{name} = {getattr(self, name)}: at least {n}" for name, n in least.items() if getattr(self, name) < n]


@dataclass(frozen=True)
class Result:
    """CPU seconds of a step, of an outer step and of counting a step, and the share of a step that all of it adds."""

    machine: str
    settings: Settings
    num_parameters: int
    step: Spread
    outer: Spread
    counting: Spread
    added: Spread


def compare(settings: Settings) -> Result:
    """Measure on one core of this machine."""
    with alone() as mesh, one_core():
        return _measure(settings, mesh)


def _measure(settings: Settings, mesh: Mesh) -> Result:
    engine, num_parameters = engine_of(settings.parameters, mesh)
    step, masters, here = stepper(engine, settings.length), engine.masters, Progress()
    at_once, never = (reptile.Method(reptile.Settings(every=every)) for every in (1, sys.maxsize))
    at_once.before_update(masters, here)
    never.before_update(masters, here)

    def outer() -> None:
        if at_once.after_update(masters, here):
            masters.refresh()

    def count() -> None:
        for _ in range(_CALLS):
            never.before_update(masters, here)
            never.after_update(masters, here)
            never.report()

    for work in (step, outer, count):  # the first of each makes what the others find
        work()
    steps, outers, counts = [], [], []
    for _ in tqdm(range(settings.repetitions), disable=not sys.stderr.isatty()):
        steps.append(_cpu_seconds(step))
        outers.append(_cpu_seconds(outer))
        counts.append(_cpu_seconds(count) / _CALLS)
    added = [(o / settings.every + c) / s for s, o, c in zip(steps, outers, counts, strict=True)]
    return Result(
        machine=", ".join([today(), processor(mesh.device), system(), *map(" ".join, versions("torch").items())]),
        settings=settings,
        num_parameters=num_parameters,
        step=Spread.of(steps),
        outer=Spread.of(outers),
        counting=Spread.of(counts),
        added=Spread.of(added),
    )


def as_lines(result: Result) -> list[str]:
    """A Markdown table."""
    settings = result.settings
    return [
        result.machine,
        "",
        f"{result.num_parameters:,} parameters, {settings.length} tokens a step; CPU time on one core, median "
        f"(smallest to largest) of {settings.repetitions} turns",
        "",
        "| | milliseconds |",
        "|---|---|",
        f"| a step | {_told(result.step, 1e3)} |",
        f"| an outer step | {_told(result.outer, 1e3)} |",
        f"| counting a step | {_told(result.counting, 1e3)} |",
        f"| added to a step at every = {settings.every}, in percent | {_told(result.added, 100)} |",
    ]


def _told(spread: Spread, scale: float) -> str:
    median, smallest, largest = (f"{scale * value:.3g}" for value in (spread.median, spread.smallest, spread.largest))
    return f"{median} ({smallest} to {largest})"


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
