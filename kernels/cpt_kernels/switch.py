"""Which twin of each operation serves on a device, and why: chosen once, told once, the same everywhere after.

    Settings --choose(settings, device)--> Kernels --> models call kernels.attention(...), kernels.rms_norm(...), ...

A file of an operation holds `TWINS` (name -> function) and `face(device)`, which says what serves when nothing is asked
for. A new twin is a new entry there; nothing changes here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from cpt_kernels import adamw, attention, cross_entropy, gelu, layer_norm, rms_norm, rotary, swiglu

_OPERATIONS: dict[str, ModuleType] = {
    "attention": attention,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rotary": rotary,
    "swiglu": swiglu,
    "gelu": gelu,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
}


@dataclass(frozen=True)
class Settings:
    """The twin of each operation by name; `auto` takes the best there is on the device.

    `all: plain` forces the plain twins everywhere, whatever else is asked for.
    """

    attention: str = "auto"
    rms_norm: str = "auto"
    layer_norm: str = "auto"
    rotary: str = "auto"
    swiglu: str = "auto"
    gelu: str = "auto"
    cross_entropy: str = "auto"
    adamw: str = "auto"
    all: str = "auto"

    def faults(self) -> list[str]:
        """One line for each name that is no twin of its operation."""
        lines = []
        for field in fields(self):
            known = ["plain"] if field.name == "all" else list(_OPERATIONS[field.name].TWINS)
            asked = getattr(self, field.name)
            if asked not in ["auto", *known]:
                lines.append(f"{field.name} = {asked} is not known; use auto, {', '.join(known)}")
        return lines


@dataclass(frozen=True)
class Kernels:
    """The functions that serve; each is described in the file of its operation.

    attention(queries, keys, values, documents=None)        rotary(queries, keys, angles)
    rms_norm(hidden, weight, epsilon, residual=None)        layer_norm(hidden, weight, bias, epsilon, residual=None)
    swiglu(gate, up)                                        gelu(hidden, is_tanh=False)
    linear_cross_entropy(hidden, weight, targets)           adamw(param_groups, learning_rate, betas, epsilon)

    `told` says for each operation which twin it is and why: a line for the log.
    """

    attention: Callable
    rms_norm: Callable
    layer_norm: Callable
    rotary: Callable
    swiglu: Callable
    gelu: Callable
    linear_cross_entropy: Callable
    adamw: Callable
    told: dict[str, str]


def choose(settings: Settings, device: torch.device) -> Kernels:
    """The functions that serve on `device`. Raises ValueError with a line for each twin that there is not."""
    faults = settings.faults()
    if faults:
        raise ValueError("\n".join(f"kernels.{line}" for line in faults))
    serving, told = {}, {}
    for operation, file in _OPERATIONS.items():
        asked = "plain" if settings.all == "plain" else getattr(settings, operation)
        if asked == "auto":
            serving[operation], told[operation] = file.face(device)
        else:
            serving[operation], told[operation] = file.TWINS[asked], f"{asked} (asked for)"
    serving["linear_cross_entropy"] = serving.pop("cross_entropy")
    return Kernels(**serving, told=told)
