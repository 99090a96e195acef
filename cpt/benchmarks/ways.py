"""The ways to compute an operation: which there are, whether they are right, and how long they take.

A way is a twin of ours, torch.compile of the plain one, or what a peer has in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from cpt.benchmarks import calls, machine
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.operations import Peer, Size
from cpt_kernels import language

_log = logging.getLogger(__name__)
# Norm of the error over norm of what is right. bf16 keeps 8 bits and is rounded a handful of times on the way.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Inputs of a CPU's calls take turns, so that those of the next are not in its cache.
_BYTES_OF_INPUTS = 1 << 27
_MOST_INPUTS = 16


@dataclass(frozen=True)
class Operation:
    """A file of `cpt.benchmarks.operations`, with its name."""

    name: str
    file: ModuleType

    @property
    def is_update(self) -> bool:
        """Whether it is an optimiser's step, which has no backward pass."""
        return getattr(self.file, "IS_UPDATE", False)


@dataclass(frozen=True)
class Way:
    """`bring()` gives the function. `is_ours`: it leaves its inputs as they are, which some peers do not."""

    name: str
    bring: Callable[[], Callable[..., Any]]
    is_ours: bool


@dataclass(frozen=True)
class Measured:
    """One way's microseconds; `speedup`: how many times as fast as the plain twin, turn by turn.

    `why_not`: why it was not timed. `error`: relative, on the sample. `extra_bytes`: the most that it takes of a GPU's
    memory in both directions.
    """

    name: str
    why_not: str | None = None
    error: float | None = None
    forward: Spread | None = None
    forward_speedup: Spread | None = None
    whole: Spread | None = None
    whole_speedup: Spread | None = None
    extra_bytes: int | None = None


def operation_named(name: str) -> Operation:
    """The operation of that name."""
    return Operation(name, importlib.import_module(f"cpt.benchmarks.operations.{name}"))


def ways_of(
    operation: Operation, device: torch.device, with_compiled: bool, with_peers: bool, builds: bool
) -> tuple[list[Way], dict[str, str]]:
    """All ways, the plain twin first; and by name why some others take no part."""
    file, twins, missing = operation.file, operation.file.KERNEL.TWINS, {}
    serving, _ = file.KERNEL.face(device)
    ways = []
    for name, twin in twins.items():
        why_not = _why_not(operation, name, device)
        if why_not:
            missing[f"{operation.name} {name}"] = why_not
        else:
            told = f"{name} (serves)" if twin is serving else name
            ways.append(Way(told, lambda twin=twin: twin, is_ours=True))
    if serving not in twins.values():
        ways.append(Way("by size (serves)", lambda: serving, is_ours=True))
    if with_compiled:
        compiled = getattr(file, "compiled", lambda plain: torch.compile(plain, dynamic=False))
        ways.append(Way("torch.compile of plain", lambda: compiled(twins["plain"]), is_ours=True))
    for name, peer in file.PEERS.items() if with_peers else ():
        why_not = why_absent(peer, device, builds)
        if why_not:
            missing[name] = why_not
        else:
            ways.append(Way(name, peer.bring, is_ours=False))
    return ways, missing


def _why_not(operation: Operation, twin: str, device: torch.device) -> str | None:
    """What keeps a twin from serving on the device; in the interpreter Triton's would take hours."""
    if twin.startswith("triton"):
        return "Triton's interpreter tells no times" if language.IS_INTERPRETED else language.why_not(device)
    known = getattr(operation.file.KERNEL, "WHY_NOT", {})
    return known[twin](device) if twin in known else None


def why_absent(peer: Peer, device: torch.device, builds: bool) -> str | None:
    """Why a peer takes no part: not made for the device, not installed, or it would have to be compiled first."""
    if peer.device not in (None, device.type):
        return "needs a GPU" if peer.device == "cuda" else "for CPUs"
    if not machine.versions(peer.package):
        return "not installed"
    if peer.builds and not builds and not _is_built(peer.builds):
        return "not built (with --build it is, in minutes)"
    return None


def _is_built(name: str) -> bool:
    """Whether torch, or whoever installed DeepSpeed, has compiled it already."""
    if any(Path(cpp_extension.get_default_build_root()).rglob(f"{name}.so")):
        return True
    return importlib.util.find_spec(f"deepspeed.ops.adam.{name}_op") is not None


def measured_ways(
    operation: Operation, ways: Sequence[Way], size: Size, dtype: torch.dtype, device: torch.device, repetitions: int
) -> list[Measured]:
    """Each way, looked at on a sample and then timed, all of them in turns."""
    errors: dict[str, float] = {}
    whys: dict[str, str] = {}
    timed: dict[str, _Timed] = {}
    expected = _on_sample(operation, operation.file.KERNEL.TWINS["plain"], size, dtype, device, is_wide=True)
    shared = _inputs(operation, size, dtype, device)
    for way in ways:
        try:
            function = way.bring()
            errors[way.name] = _error(operation, _on_sample(operation, function, size, dtype, device), expected)
            if not errors[way.name] <= TOLERANCES[_type_of(operation, dtype)]:  # not a number is wrong too
                whys[way.name] = "WRONG, not timed"
                continue
            inputs = shared if way.is_ours else _inputs(operation, size, dtype, device)
            timed[way.name] = _Timed.of(operation, function, inputs, device)
        except Exception as error:  # whatever is wrong with one way, the others can be measured
            _log.info("%s %s cannot be timed", operation.name, way.name, exc_info=error)
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            whys[way.name] = f"{type(error).__name__}: {first[:90]}".replace("|", "/")
    forward = _times([one.forward for one in timed.values()], list(timed), ways[0].name, device, repetitions)
    whole = {}
    if not operation.is_update:
        whole = _times([one.whole for one in timed.values()], list(timed), ways[0].name, device, repetitions)
    nothing = (None, None)
    return [
        Measured(
            way.name, whys.get(way.name), errors.get(way.name), *forward.get(way.name, nothing),
            *whole.get(way.name, nothing), timed[way.name].extra_bytes if way.name in timed else None,
        )
        for way in ways
    ]  # fmt: skip


@dataclass(frozen=True)
class _Timed:
    """What is called when a way is timed, warm by now."""

    forward: Callable[[], Any]
    whole: Callable[[], Any]
    extra_bytes: int | None

    @classmethod
    def of(
        cls, operation: Operation, function: Callable[..., Any], inputs: list[tuple[Any, ...]], device: torch.device
    ) -> _Timed:
        forwards = [operation.file.prepared(function, arguments) for arguments in inputs]
        wholes = forwards
        if not operation.is_update:
            wholes = [_both(*pair) for pair in zip(forwards, inputs, strict=True)]
        forward, whole = _in_turn(forwards), _in_turn(wholes)
        for call in (forward, whole, forward, whole):
            call()
        return cls(forward, whole, calls.peak_extra_bytes(whole, device))


def _both(forward: Callable[[], Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """Forward, then backward with random gradients of the outputs."""
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    upstream = [torch.randn_like(x) for x in _tensors(forward())]

    def whole() -> Any:
        return torch.autograd.grad(_tensors(forward()), wanted, upstream)

    return whole


def _in_turn(several: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turns = itertools.cycle(several)
    return lambda: next(turns)()


def _inputs(operation: Operation, size: Size, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments of one call; on a CPU of several, too many for its cache to hold."""
    first = operation.file.arguments(size, dtype, device, 1)
    if device.type != "cpu":
        return [first]
    num_bytes = sum(x.nbytes for x in first if isinstance(x, Tensor))
    number = min(_MOST_INPUTS, -(-_BYTES_OF_INPUTS // num_bytes))
    return [first, *(operation.file.arguments(size, dtype, device, 100 * seed) for seed in range(1, number))]


def _times(
    timed: list[Callable[[], Any]], names: list[str], plain: str, device: torch.device, repetitions: int
) -> dict[str, tuple[Spread, Spread | None]]:
    """(microseconds, times as fast as plain) by way."""
    taken = dict(zip(names, calls.microseconds_of(timed, device, repetitions), strict=True))
    yardstick = taken.get(plain)
    return {
        name: (
            Spread.of(values),
            Spread.of([theirs / own for theirs, own in zip(yardstick, values, strict=True)]) if yardstick else None,
        )
        for name, values in taken.items()
    }


def _on_sample(
    operation: Operation,
    function: Callable[..., Any],
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    is_wide: bool = False,
) -> list[Tensor]:
    """Outputs and gradients for a small sample, in float64; computed in it too if `is_wide`, of the same inputs."""
    arguments = operation.file.arguments(size.sample, dtype, device, 5)
    if is_wide:
        arguments = tuple(
            x.detach().double().requires_grad_(x.requires_grad)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in arguments
        )
    call = operation.file.prepared(function, arguments)
    if operation.is_update:
        begun = arguments[0].clone()
        for _ in range(2):  # one with each gradient, because some ways clip them in place
            updated = call()
        return [(updated - begun).double()]
    outputs = _tensors(call())
    upstream = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(dtype).to(x.device, x.dtype)
        for x in outputs
    ]
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    return [x.detach().double() for x in (*outputs, *gradients)]


def _tensors(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _error(operation: Operation, got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the outputs and gradients, each relative to its norm."""
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(got, expected, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _type_of(operation: Operation, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if operation.is_update else dtype
