"""How fast a checkpoint is written and read, and how long training waits: this project beside dd and its peers.

One process trains a Llama; the masters and moments of its engine are what everybody saves. The ways take turns, so that
what disturbs the disk disturbs all alike, and rates are held against dd's of the same turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from cpt.benchmarks.machine import alone
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.options import option
from cpt.benchmarks.saves import Save, Way, empty, seconds_to_load, ways
from cpt.checkpoint import Saver
from cpt.config import Fault, build
from cpt.engine import Engine
from cpt.engine.settings import Batch, Optimizer
from cpt.engine.settings import Settings as EngineSettings
from cpt.models import llama
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress
from cpt_kernels import switch

_BYTES_A_PARAMETER = 12  # fp32 master and two moments
_VOCABULARY = 8192


@dataclass(frozen=True)
class Settings:
    """What is saved, on the disk of `folder`."""

    gigabytes: float = option(1.0, "of masters and moments")
    repetitions: int = option(5, "turns of each way")
    length: int = option(128, "tokens of the window that a step trains on")
    peers: bool = option(True, "dd and ours alone")
    folder: Path | None = option(None, "on the disk to measure; files go away again (default: /tmp)", "DIR")

    def faults(self) -> list[str]:
        """Nothing to save, no turn, no token."""
        faults = [] if self.gigabytes > 0 else [f"gigabytes = {self.gigabytes}: above 0"]
        if self.length < 2:
            faults.append(f"length = {self.length}: at least 2")
        return faults + ([] if self.repetitions >= 1 else [f"repetitions = {self.repetitions}: at least 1"])


@dataclass(frozen=True)
class Written:
    """One way's saves. Seconds; GB/s of its own bytes; the rate over dd's, turn by turn; CPU seconds."""

    name: str
    gigabytes: float
    blocking: Spread
    total: Spread
    gb_per_second: Spread
    over_dd: Spread
    cpu: Spread


@dataclass(frozen=True)
class Result:
    """What was measured. `steps`: seconds of steps by what went on beside them; `loads`: seconds by way."""

    machine: str
    versions: dict[str, str]
    load: tuple[float, float]
    settings: Settings
    num_parameters: int
    writes: list[Written]
    loads: dict[str, Spread]
    steps: dict[str, Spread]
    num_steps_pending: int


def compare(settings: Settings) -> Result:
    """Measure, in a new folder that goes away. Raises Fault if its disk has not room."""
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="cpt-bench-") as work:
        needed, free = 3 * settings.gigabytes * 1e9, shutil.disk_usage(work).free
        if free < needed:
            raise Fault(f"{work}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are there")
        with alone() as mesh:
            return _measure(settings, mesh, Path(work))


def _measure(settings: Settings, mesh: Mesh, work: Path) -> Result:
    load_before = os.getloadavg()[0]
    engine, num_parameters = engine_of(round(settings.gigabytes * 1e9 / _BYTES_A_PARAMETER), mesh)
    step = stepper(engine, settings.length)
    step()
    saves: dict[str, list[Save]] = {}
    loads: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {"alone": [], "beside a save": [], "with a save that is waited for": []}
    everybody = ways(engine, mesh, settings.peers)
    for way in everybody:  # what is made at the first save alone is not counted
        way.save(empty(work / "it"))
    turns = settings.repetitions * (len(everybody) + 1)
    with tqdm(total=turns, unit="turn", disable=not sys.stderr.isatty()) as bar, Saver(mesh) as saver:
        for _ in range(settings.repetitions):
            for way in everybody:
                saves.setdefault(way.name, []).append(way.save(empty(work / "it")))
                if way.load:
                    loads.setdefault(way.name, []).append(seconds_to_load(way, work / "it"))
                bar.update()
            for name, seconds in _steps_beside_saves(engine, saver, step, empty(work / "it")).items():
                steps[name] += seconds
            bar.update()
    return Result(
        machine=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch on {mesh.device.type}",
        versions={name: version(name) for name in ("torch", "deepspeed")},
        load=(load_before, os.getloadavg()[0]),
        settings=settings,
        num_parameters=num_parameters,
        writes=[_written(way, saves[way.name], saves[everybody[0].name]) for way in everybody],
        loads={name: Spread.of(seconds) for name, seconds in loads.items()},
        steps={name: Spread.of(seconds) for name, seconds in steps.items()},
        num_steps_pending=len(steps["beside a save"]),
    )


def engine_of(num_parameters: int, mesh: Mesh) -> tuple[Engine, int]:
    """A Llama of at least so many parameters, in bf16 under ZeRO 1, with initial values; how many they are."""
    shape = _shape(num_parameters)
    kernels = switch.choose(switch.Settings(), mesh.device)
    model = build(shape, "Model", kernels)
    engine = Engine(
        model,
        EngineSettings("bf16", 1, Batch(1), Optimizer(), {}),
        mesh,
        [],
        lambda groups: kernels.adamw(groups, 0.0, (0.9, 0.95), 1e-8),
        decays=model.decays,
    )
    engine.fill(lambda name, start, stop: model.initial_value(name, 1).reshape(-1)[start:stop], check=False)
    return engine, shape.num_parameters


def _shape(num_parameters: int) -> llama.Settings:
    """The narrowest Llama of at least so many parameters, with a layer for each 64 of its width."""

    def of_width(width: int) -> llama.Settings:
        return llama.Settings(vocabulary=_VOCABULARY, width=width, layers=width // 64, heads=width // 64)

    shapes = map(of_width, range(64, 1 << 16, 64))
    return next(shape for shape in shapes if shape.num_parameters >= num_parameters)


def stepper(engine: Engine, length: int) -> Callable[[], float]:
    """Takes the next step, on a window of that length; its seconds."""
    numbers, done = torch.Generator().manual_seed(1), [0]

    def step() -> float:
        tokens = torch.randint(0, _VOCABULARY, (1, length + 1), generator=numbers)
        began = time.perf_counter()
        engine.step(tokens, torch.zeros(1, dtype=torch.int64), 1, 1e-5, Progress(step=done[0], stage_step=done[0]))
        done[0] += 1
        return time.perf_counter() - began

    return step


def _steps_beside_saves(
    engine: Engine, saver: Saver, step: Callable[[], float], folder: Path
) -> dict[str, list[float]]:
    """Seconds of steps: alone; while a save is written; and of one with a save that training waits for."""
    alone = [step() for _ in range(4)]
    saver.begin(folder / "step-1", engine.content({}), copies=True)
    beside = []
    while saver.is_pending:
        beside.append(step())
        saver.poll()
    seconds, began = step(), time.perf_counter()
    saver.begin(folder / "step-2", engine.content({}), copies=False)
    saver.wait()
    return {
        "alone": alone,
        "beside a save": beside,
        "with a save that is waited for": [seconds + time.perf_counter() - began],
    }


def _written(way: Way, saves: Sequence[Save], of_dd: Sequence[Save]) -> Written:
    rates = [save.num_bytes / 1e9 / save.total for save in saves]
    return Written(
        way.name,
        statistics.median(save.num_bytes for save in saves) / 1e9,
        Spread.of([save.blocking for save in saves]),
        Spread.of([save.total for save in saves]),
        Spread.of(rates),
        Spread.of([rate / (dd.num_bytes / 1e9 / dd.total) for rate, dd in zip(rates, of_dd, strict=True)]),
        Spread.of([save.cpu for save in saves]),
    )


def as_lines(result: Result) -> list[str]:
    """Markdown tables."""
    settings = result.settings
    lines = [
        f"{result.num_parameters:,} parameters, masters and two moments: "
        f"{result.num_parameters * _BYTES_A_PARAMETER / 1e9:.2f} GB; {result.machine}; "
        f"{', '.join(f'{name} {number}' for name, number in result.versions.items())}; "
        f"load {result.load[0]:.1f} before, {result.load[1]:.1f} after; "
        f"median (smallest to largest) of {settings.repetitions} turns, fsync included",
        "",
        "| written by | GB | training waits, s | on the disk after, s | GB/s | over dd of the same turn | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.gigabytes:.2f} | {_told(one.blocking)} | {_told(one.total)} | "
        f"{_told(one.gb_per_second)} | {_told(one.over_dd)} | {_told(one.cpu)} |"
        for one in result.writes
    ]
    lines += ["", "| read back by | s |", "|---|---|"]
    lines += [f"| {name} | {_told(seconds)} |" for name, seconds in result.loads.items()]
    lines += ["", f"| a step ({settings.length} tokens) | s |", "|---|---|"]
    lines += [f"| {name} | {_told(seconds)} |" for name, seconds in result.steps.items()]
    return lines


def _told(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.smallest:.2f} to {spread.largest:.2f})"
