"""Time each operation of a training step: our twins, torch.compile and each library that is installed, in one run.

Every way is held against the plain twin in float64 on a small sample first; one that is wrong is told and not timed.
Beside the times stands the floor: bytes over the bandwidth of a copy, FLOPs over the rate of a matrix product, both
measured in the same run. On a GPU times are the GPU's, with nothing left in its cache; on a CPU those of one thread.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from cpt.benchmarks import calls, machine
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.models import MODELS
from cpt.benchmarks.operations import Size
from cpt.benchmarks.options import option
from cpt.benchmarks.table import number, table, told
from cpt.benchmarks.ways import Measured, Operation, measured_ways, operation_named, ways_of
from cpt.config import names_of_choices
from cpt.config.faults import nearest

_log = logging.getLogger(__name__)
_OPERATIONS = "cpt.benchmarks.operations"
# Windows and positions of the micro-batch of each model.
_MICRO_BATCHES = {
    "pythia-410m": (8, 2048),
    "llama-3.2-1b": (8, 2048),
    "llama-3-8b": (2, 4096),
    "small-llama": (4, 256),
    "small-pythia": (4, 256),
}
_SHAPES_ON = {"cuda": ("pythia-410m", "llama-3.2-1b", "llama-3-8b"), "cpu": ("small-llama", "small-pythia")}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long at most."""

    operation: tuple[str, ...] = option((), "some operations only", "NAME,NAME", shown="all")
    shape: tuple[str, ...] = option((), f"of {', '.join(_MICRO_BATCHES)}", "NAME,NAME", shown="those for the device")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto, cpu or cuda", "KIND")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "bf16, fp16 or fp32", "TYPE", shown="bf16 on a GPU, fp32 on a CPU"
    )
    repetitions: int = option(7, "turns of each way")
    minutes: float = option(60.0, "begin nothing new after so many")
    compile: bool = option(True, "leave out torch.compile of the plain twins")
    peers: bool = option(True, "our own and torch.compile alone")
    build: bool = option(False, "let DeepSpeed compile its optimisers first, which takes minutes")

    def faults(self) -> list[str]:
        """Unknown names, a GPU that is not there, and counts below what can be measured."""
        faults = []
        for name, given, known in (
            ("operation", self.operation, names_of_choices(_OPERATIONS)),
            ("shape", self.shape, list(_MICRO_BATCHES)),
        ):
            faults += [f"{name} = {word}: there is none; {nearest(word, known)}" for word in given if word not in known]
        if self.device == "cuda" and not torch.cuda.is_available():
            faults.append("device = cuda: torch finds no GPU here; leave it out")
        if self.repetitions < 1:
            faults.append(f"repetitions = {self.repetitions}: at least 1")
        return faults + ([] if self.minutes > 0 else [f"minutes = {self.minutes}: above 0"])


@dataclass(frozen=True)
class OperationResult:
    """One operation at one size. Floors in microseconds; that of both directions is None for an optimiser."""

    operation: str
    shape: str
    forward_floor: float
    whole_floor: float | None
    ways: list[Measured]


@dataclass(frozen=True)
class Result:
    """What was measured on what. `missing`: ways that take no part, and why."""

    settings: Settings
    kind: str
    machine: str
    day: str
    versions: dict[str, str]
    precision: str
    gb_per_second: Spread
    tflops: Spread
    operations: list[OperationResult]
    missing: dict[str, str]


def region(settings: Settings) -> str:
    """The part of a document that these tables are: one for GPUs, one for CPUs."""
    return f"cpt bench kernels on {machine.device_of(settings.device).type}"


def compare(settings: Settings) -> Result:
    """Measure all operations of all shapes that are asked for."""
    device = machine.device_of(settings.device)
    precision = settings.precision if settings.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    dtype, until = _DTYPES[precision], time.monotonic() + 60 * settings.minutes
    sizes = [Size.of_model(name, MODELS[name], *_MICRO_BATCHES[name]) for name in _shapes(settings, device)]
    names = settings.operation or names_of_choices(_OPERATIONS)
    operations = {name: operation_named(name) for name in names}
    jobs = [(name, size) for size in sizes for name in names if operations[name].file.serves(size)]
    if device.type == "cpu" and not settings.shape:  # there the shapes hardly differ, and compiling takes longest
        jobs = [job for at, job in enumerate(jobs) if job[0] not in {name for name, _ in jobs[:at]}]
    results, missing = [], {}
    with machine.one_thread():
        bandwidth = calls.bandwidth(device, settings.repetitions)
        rate = calls.matmul_rate(device, dtype, settings.repetitions)
        with tqdm(total=len(jobs), unit="operation", disable=not sys.stderr.isatty()) as bar:
            for name, size in jobs:
                _log.info("%s of %s", name, size.name)
                ways, absent = ways_of(operations[name], device, settings.compile, settings.peers, settings.build)
                missing |= absent
                if time.monotonic() > until:
                    measured = [Measured("all ways", "not measured: the time was over")]
                else:
                    measured = measured_ways(operations[name], ways, size, dtype, device, settings.repetitions)
                results.append(_with_floor(operations[name], size, dtype, bandwidth, rate, measured))
                if settings.compile:
                    torch.compiler.reset()
                if device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
                bar.update()
    return Result(
        settings,
        device.type,
        f"{machine.processor(device)}{', one thread' if device.type == 'cpu' else ''}; {machine.system()}",
        machine.today(),
        machine.versions("torch", "triton", "deepspeed", "liger-kernel", "flash-attn", "transformer-engine", "apex"),
        precision,
        _scaled(bandwidth, 1e-9),
        _scaled(rate, 1e-12),
        results,
        missing,
    )


def _shapes(settings: Settings, device: torch.device) -> tuple[str, ...]:
    return settings.shape or _SHAPES_ON[device.type]


def _with_floor(
    operation: Operation, size: Size, dtype: torch.dtype, bandwidth: Spread, rate: Spread, ways: list[Measured]
) -> OperationResult:
    forward, backward = (
        work.microseconds(bandwidth.median, rate.median) if work else None for work in operation.file.work(size, dtype)
    )
    whole = None if backward is None else forward + backward
    return OperationResult(operation.name, size.name, forward, whole, ways)


def _scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.median * factor, spread.smallest * factor, spread.largest * factor)


def as_lines(result: Result) -> list[str]:
    """What was measured on, then a table for each shape."""
    lines = [
        f"{result.day}, {result.machine}; {', '.join(f'{name} {is_at}' for name, is_at in result.versions.items())}. "
        f"{result.precision}, AdamW fp32; medians (smallest to largest) of {result.settings.repetitions} "
        "alternating repetitions; times as fast as plain, turn by turn.",
        f"Measured in this run: {told(result.gb_per_second)} GB/s, read and written, and {told(result.tflops)} "
        "TFLOP/s of a matrix product, of which the floors are made. Errors: against float64, of outputs and gradients.",
    ]
    for shape in dict.fromkeys(one.shape for one in result.operations):
        model, (windows, positions) = MODELS[shape], _MICRO_BATCHES[shape]
        lines += [
            "",
            f"**{shape}**: {windows} windows of {positions}, width {model.width}, {model.heads} heads of "
            f"{model.width_of_head} ({model.num_kv_heads} of keys), feed-forward {model.width_of_mlp}, "
            f"vocabulary {model.vocabulary}",
            "",
        ]
        lines += _table_of([one for one in result.operations if one.shape == shape])
    whys = dict.fromkeys(result.missing.values())
    lines += [""] if whys else []
    return lines + [f"Not measured, {why}: {_names_of(why, result.missing)}." for why in whys]


def _names_of(why: str, missing: dict[str, str]) -> str:
    return ", ".join(name for name, its in missing.items() if its == why)


def _table_of(operations: list[OperationResult]) -> list[str]:
    head = (
        "operation", "way", "forward, us", "of floor", "times plain",
        "with backward, us", "of floor", "times plain", "extra MiB", "error",
    )  # fmt: skip
    rows = []
    for one in operations:
        rows.append((f"**{one.operation}**", "floor", number(one.forward_floor), "", "") + (
            (number(one.whole_floor), "", "", "", "") if one.whole_floor else ("",) * 5
        ))  # fmt: skip
        rows += [("", *_row(one, way)) for way in one.ways]
    is_told = [any(column) for column in zip(*rows, strict=True)]  # a CPU has no extra memory to tell
    told_of, *told_rows = ([*itertools.compress(row, is_told)] for row in (head, *rows))
    return table(told_of, told_rows)


def _row(one: OperationResult, way: Measured) -> tuple[str, ...]:
    error = "" if way.error is None else f"{way.error:.0e}"
    if way.why_not:
        return way.name, way.why_not, "", "", "", "", "", "", error
    return (
        way.name,
        *_direction(way.forward, one.forward_floor, way.forward_speedup),
        *_direction(way.whole, one.whole_floor, way.whole_speedup),
        "" if way.extra_bytes is None else number(way.extra_bytes / 2**20),
        error,
    )


def _direction(microseconds: Spread | None, floor: float | None, speedup: Spread | None) -> tuple[str, str, str]:
    if microseconds is None:
        return "", "", ""
    share = f"{floor / microseconds.median:.0%}" if floor else ""
    return told(microseconds), share, "" if speedup is None else told(speedup) if speedup.largest != 1 else "1"
