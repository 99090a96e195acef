"""How fast, against what could be: model FLOPs utilisation against a peak that is always told."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

# Dense bf16 TFLOP/s of one device as its maker states them; the names are whole words of what CUDA calls the device,
# the first that fits counts.
_STATED_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
}

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Peak:
    """The most one device can compute, in FLOP/s, and where the number is from."""

    flops: float
    origin: str


def find_peak(device: torch.device, precision: str, stated_tflops: float | None = None) -> Peak:
    """The peak to measure against: the setting, else what the maker states, else a matrix product timed here.

    The timed one takes about a tenth of a second and is a lower bound: a noisy machine makes it smaller.
    """
    if stated_tflops:
        return Peak(stated_tflops * 1e12, f"{stated_tflops:g} TFLOP/s, set by log.peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in _STATED_TFLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return Peak(tflops * 1e12, f"{tflops:g} TFLOP/s, stated for {name} (dense bf16)")
    flops = _timed_matmul(device, _DTYPES[precision])
    return Peak(flops, f"{flops / 1e12:.3g} TFLOP/s, measured by a {precision} matrix product on one rank")


def _timed_matmul(device: torch.device, dtype: torch.dtype, size: int = 768) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def as_duration(seconds: float) -> str:
    """`1d02h`, `2h05m`, `3m20s`, `12s`: the two largest units."""
    seconds = max(0, round(seconds))
    for unit, next_unit, length, next_length in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= length:
            return f"{seconds // length}{unit}{seconds % length // next_length:02d}{next_unit}"
    return f"{seconds}s"
