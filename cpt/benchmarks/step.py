"""Time whole training steps: our engine as `cpt train` builds it beside others' models under the same DeepSpeed.

Every way has a process of its own and begins with the same weights; the ways take turns, step by step. Tokens a second,
MFU by the causal and by the full count of FLOPs, peak memory; and where the time of one of our steps goes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from cpt.benchmarks import calls, machine, step_profile
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.models import MODELS
from cpt.benchmarks.options import option
from cpt.benchmarks.step_turns import WARM_STEPS, Taken, groups_of_a_step, groups_that_fit, in_turns
from cpt.benchmarks.step_ways import WAYS, Case, why_absent
from cpt.benchmarks.table import number, table, told
from cpt.config.faults import nearest
from cpt.observe.speed import Peak, find_peak
from cpt.planning.memory import model_state

_CASES_ON = {
    "cuda": ("pythia-410m@2048", "pythia-410m@4096", "llama-3.2-1b@2048", "llama-3.2-1b@4096", "llama-3-8b@4096"),
    "cpu": ("quickstart@128",),
}
_TOKENS_ON = {"cuda": 65536, "cpu": 4096}
# Tokens at once, of models with no more parameters than that.
_MICRO_BATCH_TOKENS = {600e6: 16384, 2e9: 8192, float("inf"): 4096}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long at most."""

    case: tuple[str, ...] = option((), "models with positions of a window", "MODEL@N,...", shown="those for the device")
    way: tuple[str, ...] = option((), f"of {', '.join(WAYS)}", "NAME,NAME", shown="all")
    tokens: int = option(0, "of a step", shown="64K on a GPU, 4K on a CPU")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto, cpu or cuda", "KIND")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "bf16 or fp32", "TYPE", shown="bf16 on a GPU, fp32 on a CPU"
    )
    repetitions: int = option(7, "steps of each way")
    minutes: float = option(60.0, "begin nothing new after so many")
    profile: bool = option(True, "do not look into a step")

    def faults(self) -> list[str]:
        """Unknown names, a GPU that is not there, and counts below what can be measured."""
        faults = []
        for word in self.case:
            model, _, positions = word.partition("@")
            if model not in MODELS:
                faults.append(f"case = {word}: there is no such model; {nearest(model, MODELS)}")
            elif not positions.isdigit() or int(positions) < 2:
                faults.append(f"case = {word}: say how long its windows are, such as {model}@2048")
        faults += [f"way = {word}: there is none; {nearest(word, WAYS)}" for word in self.way if word not in WAYS]
        if self.device == "cuda" and not torch.cuda.is_available():
            faults.append("device = cuda: torch finds no GPU here; leave it out")
        if self.tokens < 0:
            faults.append(f"tokens = {self.tokens}: at least one window")
        if self.repetitions < 1:
            faults.append(f"repetitions = {self.repetitions}: at least 1")
        return faults + ([] if self.minutes > 0 else [f"minutes = {self.minutes}: above 0"])


@dataclass(frozen=True)
class Measured:
    """One way's steps. `speedup`: times as fast as transformers, turn by turn. `why_not`: why it was not timed."""

    name: str
    why_not: str | None = None
    tokens_per_second: Spread | None = None
    speedup: Spread | None = None
    mfu: float | None = None
    mfu_full: float | None = None
    peak_gib: float | None = None
    first_loss: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """One model at one length. `groups`: seconds of one of our steps by what they were spent on."""

    name: str
    case: Case
    state_gib: float
    ways: list[Measured]
    groups: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What was measured on what."""

    settings: Settings
    machine: str
    day: str
    versions: dict[str, str]
    peak: str
    cases: list[CaseResult]


def region(settings: Settings) -> str:
    """The part of a document that these tables are: one for GPUs, one for CPUs."""
    return f"cpt bench step on {machine.device_of(settings.device).type}"


def compare(settings: Settings) -> Result:
    """Measure every way of every case."""
    device = machine.device_of(settings.device)
    until = time.monotonic() + 60 * settings.minutes
    precision = settings.precision if settings.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    peak = _peak(device, precision)
    results = []
    for name in settings.case or _CASES_ON[device.type]:
        case = _case(name, settings.tokens or _TOKENS_ON[device.type], precision)
        results.append(_measured_case(name, case, settings, device, peak.flops, until))
    return Result(
        settings,
        f"{machine.processor(device)}{', one thread' if device.type == 'cpu' else ''}; {machine.system()}",
        machine.today(),
        machine.versions("torch", "triton", "deepspeed", "transformers", "litgpt", "nanotron"),
        peak.origin,
        results,
    )


def _peak(device: torch.device, precision: str) -> Peak:
    """What a GPU's maker states; of a CPU one thread's product, measured as the steps are."""
    if device.type == "cuda":
        return find_peak(device, precision)
    with machine.one_thread():
        rate = calls.matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32, 3).median
    return Peak(rate, f"{rate / 1e9:.0f} GFLOP/s, measured by a {precision} matrix product in this run")


def _case(name: str, tokens: int, precision: str) -> Case:
    model, _, positions = name.partition("@")
    number_of = MODELS[model].num_parameters
    at_once = next(tokens_at_once for most, tokens_at_once in _MICRO_BATCH_TOKENS.items() if number_of <= most)
    windows = max(1, tokens // int(positions))
    micro_batch = max(1, min(windows, at_once // int(positions)))
    return Case(model, int(positions), windows // micro_batch * micro_batch, micro_batch, precision)


def _measured_case(
    name: str, case: Case, settings: Settings, device: torch.device, peak: float, until: float
) -> CaseResult:
    state = model_state(case.settings.num_parameters, case.precision, case.zero, 1).total
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    ways = {way: why_absent(WAYS[way], device) for way in settings.way or WAYS}
    if memory and state > 0.9 * memory:
        too_large = f"does not fit: its state alone is {state / 2**30:.0f} GiB, the GPU has {memory / 2**30:.0f}"
        ways = {way: why_not or too_large for way, why_not in ways.items()}
    there = [way for way, why_not in ways.items() if why_not is None]
    taken: dict[str, Taken] = {}
    for together in groups_that_fit(there, state, memory):
        if time.monotonic() > until:
            ways |= dict.fromkeys([way for way in together if way not in taken], "not measured: the time was over")
        else:
            for way, of_way in in_turns(name, case, together, settings.repetitions, device).items():
                if way not in taken:
                    taken[way] = of_way
    groups = {}
    if settings.profile and "ours" in taken and not taken["ours"].why_not and time.monotonic() <= until:
        groups = groups_of_a_step(case, device)
    measured = [
        _told_way(way, case, taken[way], peak) if way in taken else Measured(way, why_not)
        for way, why_not in ways.items()
    ]
    return CaseResult(name, case, state / 2**30, measured, groups)


def _told_way(way: str, case: Case, taken: Taken, peak: float) -> Measured:
    if taken.why_not:
        return Measured(way, taken.why_not)
    speed = Spread.of([case.tokens_a_step / seconds for seconds in taken.seconds])
    settings = case.settings
    causal = settings.flops_per_token(case.positions)
    full = 2 * causal - 6 * settings.num_matmul_parameters  # attention meets every position, not half of them
    ratios = taken.of_yardstick and [
        theirs / own for theirs, own in zip(taken.of_yardstick, taken.seconds, strict=True)
    ]
    return Measured(
        way,
        None,
        speed,
        Spread.of(ratios) if ratios else None,
        speed.median * causal / peak,
        speed.median * full / peak,
        taken.peak_bytes / 2**30,
        taken.first_loss,
    )


def as_lines(result: Result) -> list[str]:
    """What was measured on, then a table for each case, with where the time goes."""
    lines = [
        f"{result.day}, {result.machine}; {', '.join(f'{name} {is_at}' for name, is_at in result.versions.items())}. "
        f"Medians (smallest to largest) of {result.settings.repetitions} steps of each way, in turns, after "
        f"{WARM_STEPS} that do not count; MFU against {result.peak}.",
    ]
    for one in result.cases:
        case = one.case
        lines += [
            "",
            f"**{one.name}**: {case.settings.num_parameters:,} parameters, {case.precision}, ZeRO {case.zero}, "
            f"a step of {case.windows} windows of {case.positions}, {case.micro_batch} at once; "
            f"state {one.state_gib:.2f} GiB",
            "",
        ]
        head = ("way", "tokens/s", "times transformers", "MFU causal", "MFU full", "peak GiB", "first loss")
        lines += table(head, [_row(way) for way in one.ways])
        if one.groups:
            whole = sum(one.groups.values())
            shares = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in one.groups.items())
            lines += ["", f"One step of ours by what its time is spent on: {shares}. {step_profile.limit(one.groups)}"]
    return lines


def _row(way: Measured) -> tuple[str, ...]:
    if way.why_not:
        return way.name, way.why_not, "", "", "", "", ""
    return (
        way.name,
        told(way.tokens_per_second),
        told(way.speedup) if way.speedup else "",
        f"{way.mfu:.1%}",
        f"{way.mfu_full:.1%}",
        number(way.peak_gib),
        f"{way.first_loss:.4f}",
    )
