"""Where the time of one step goes: by what the operations of a model say of themselves, and else by torch's names.

forward:   an event within "cpt:rms_norm"                  -> norms
backward:  the node that belongs to such an event           -> norms (torch numbers a node as its forward operation)
others:    by name: products, collectives; what is left     -> rest
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_GROUP_OF_OPERATION = {
    "attention": "attention",
    "rotary": "attention",
    "rms_norm": "norms",
    "layer_norm": "norms",
    "add_rms_norm": "norms",
    "swiglu": "activations",
    "gelu": "activations",
    "linear_cross_entropy": "head and loss",
    "optimiser": "optimiser",
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")
_COLLECTIVES = ("c10d::", "nccl", "gloo:", "record_param_comms")
WAITING = "GPU waits for Python"


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds of one step by group, of the GPU's time or of one CPU thread's; and of the whole step."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    for _ in range(2):
        step()
    seconds = _seconds(step, device)  # without the profiler, which makes launches slower
    with profile(activities=activities) as profiler:
        _seconds(step, device)
    groups = seconds_by_group(profiler.events(), is_gpu)
    if is_gpu:
        groups[WAITING] = max(0.0, seconds - sum(groups.values()))
    return {"groups": groups, "seconds": seconds}


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if is_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def seconds_by_group(events: Iterable[Any], is_gpu: bool) -> dict[str, float]:
    """Own time of all of a profiler's events, by group; largest first."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    of_node = {}
    for event in events:
        group = _told_group(event)
        if group and event.sequence_nr >= 0 and not _is_backward(event):
            of_node.setdefault(event.sequence_nr, group)
    seconds: dict[str, float] = {}
    for event in events:
        own = (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e6
        if own > 0 and event.name != "ProfilerStep":
            group = _group_of(event, of_node)
            seconds[group] = seconds.get(group, 0.0) + own
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def _group_of(event: Any, of_node: dict[int, str]) -> str:
    """What it or an event around it says; else what it is by name."""
    told = _told_group(event)
    if told:
        return told
    for one in _with_those_around(event):
        if _is_backward(one) and one.sequence_nr in of_node:
            return of_node[one.sequence_nr]
    names = [one.name for one in _with_those_around(event)]
    if any(name.startswith(_COLLECTIVES) for name in names):
        return "communication"
    return "matmuls" if any(name in _PRODUCTS for name in names) else "rest"


def _told_group(event: Any) -> str | None:
    for one in _with_those_around(event):
        if one.name.startswith("cpt:"):
            return _GROUP_OF_OPERATION.get(one.name.removeprefix("cpt:"), "rest")
    return None


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _with_those_around(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def limit(groups: dict[str, float]) -> str:
    """A sentence on what limits the step."""
    whole = sum(groups.values())
    shares = sorted(((seconds / whole, name) for name, seconds in groups.items()), reverse=True)
    (largest, name), (next_largest, next_name) = shares[0], shares[1] if len(shares) > 1 else (0.0, "nothing")
    if name == WAITING:
        return f"Limited by launches: for {largest:.0%} of the step nothing runs on the GPU."
    return f"Limited by {name} ({largest:.0%} of the time); then come {next_name} ({next_largest:.0%})."
