"""Which twin of each operation serves on a device, and why: chosen once, told once, the same everywhere after.

    Settings --choose(settings, device)--> Kernels --> models call kernels.attention(...), kernels.rms_norm(...), ...

A file of an operation holds `TWINS` (name -> function) and `face(device)`, which says what serves when nothing is asked
for. A new twin is a new entry there; nothing changes here. It may hold, too,

    WHY_NOT          twin -> function of a device: a few words if something keeps the twin from serving there
    check(device)    a few words if the Triton twin is not what `plain` is on small inputs, on that very device
    THROUGH_TRITON   functions that `face` gives and that are Triton's for some inputs only
    PREFERRED        functions that `face` gives and that are another library's -> its name, and a check of its own;
                     where that fails, `face(device, fault)` says what is next

What goes through Triton, or through a library that torch does not come with, serves unasked only where its check has
passed: no list of GPUs or versions is as good as a try.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from cpt_kernels import adamw, attention, cross_entropy, gelu, language, layer_norm, rms_norm, rotary, swiglu

_log = logging.getLogger(__name__)

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

    `all: plain` forces the plain twins everywhere, whatever else is asked for; `all: triton` Triton's, where there are.
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
            known = ["plain", "triton"] if field.name == "all" else list(_OPERATIONS[field.name].TWINS)
            asked = getattr(self, field.name)
            if asked not in ["auto", *known]:
                lines.append(f"{field.name} = {asked} is not known; use auto, {', '.join(known)}")
        return lines

    def faults_on(self, device: torch.device) -> list[str]:
        """One line for each twin that is asked for and cannot serve on `device`, with those that can."""
        lines = []
        for operation, file in _OPERATIONS.items():
            asked = self.asked(operation)
            reason = _why_not(file, asked, device)
            if reason is not None:
                name = operation if self.all == "auto" else "all"
                twins = file.TWINS if self.all == "auto" else ["plain"]
                others = [twin for twin in twins if _why_not(file, twin, device) is None]
                use = f"{', '.join(['auto', *others[:-1]])} or {others[-1]}"
                lines.append(f"{name} = {asked} cannot serve on {device.type}: {reason}; use {use}")
        return list(dict.fromkeys(lines))

    def asked(self, operation: str) -> str:
        """The twin that is wanted of an operation."""
        is_for_all = self.all in _OPERATIONS[operation].TWINS
        return self.all if is_for_all else getattr(self, operation)


@dataclass(frozen=True)
class Kernels:
    """The functions that serve; each is described in the file of its operation.

    attention(queries, keys, values, documents=None)        rotary(queries, keys, angles)
    rms_norm(hidden, weight, epsilon, residual=None)        layer_norm(hidden, weight, bias, epsilon, residual=None)
    swiglu(gate, up)                                        gelu(hidden, is_tanh=False)
    linear_cross_entropy(hidden, weight, targets)           adamw(param_groups, learning_rate, betas, epsilon)

    `told` says for each operation which twin it is and why, `here` what there is on this machine: lines for the log.
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
    here: str


def choose(settings: Settings, device: torch.device) -> Kernels:
    """The functions that serve on `device`. Raises ValueError with a line for each twin that cannot.

    On a GPU Triton's twins are compiled and tried here, and flash-attn is tried; the first time on a machine it takes
    seconds.
    """
    faults = settings.faults() or settings.faults_on(device)
    if faults:
        raise ValueError("\n".join(f"kernels.{line}" for line in faults))
    serving, told = {}, {}
    for operation, file in _OPERATIONS.items():
        asked = settings.asked(operation)
        if asked == "auto":
            serving[operation], told[operation] = _best(operation, file, device)
        else:
            serving[operation], told[operation] = file.TWINS[asked], f"{asked} (asked for)"
    serving["linear_cross_entropy"] = serving.pop("cross_entropy")
    return Kernels(**serving, told=told, here=_here(device))


def _why_not(file: ModuleType, twin: str, device: torch.device) -> str | None:
    known = {"triton": language.why_not, **getattr(file, "WHY_NOT", {})}
    return known[twin](device) if twin in known else None


def _best(operation: str, file: ModuleType, device: torch.device) -> tuple[Callable, str]:
    """What the file says, if that is torch's or if it does here what it should; else what is next."""
    serving, told = file.face(device)
    library, check = getattr(file, "PREFERRED", {}).get(serving, (None, None))
    if library is not None:
        fault = _fault(check, device)
        if fault is None:
            return serving, told
        _log.warning("kernels.%s: %s is not used, it failed its check on %s: %s", operation, library, device, fault)
        serving, told = file.face(device, f"{library} failed its check here: {fault}")
    if serving not in (file.TWINS.get("triton"), *getattr(file, "THROUGH_TRITON", ())):
        return serving, told
    name = "torch" if "torch" in file.TWINS else "plain"
    if language.IS_INTERPRETED:
        return file.TWINS[name], f"{name} (Triton is interpreted, which is for tests)"
    fault = _fault(file.check, device)
    if fault is None:
        return serving, told
    _log.warning("kernels.%s: Triton's twin is not used, it failed its check on %s: %s", operation, device, fault)
    return file.TWINS[name], f"{name} (Triton's twin failed its check here: {fault})"


def _fault(check: Callable[[torch.device], str | None], device: torch.device) -> str | None:
    try:
        return check(device)
    except Exception as error:  # whatever a compiler or a driver raises; it is told on
        reason = str(error).strip().splitlines() or ["no reason given"]
        return f"{type(error).__name__}: {reason[0]}"


def _here(device: torch.device) -> str:
    parts = [device.type]
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        parts = [torch.cuda.get_device_name(device), f"sm_{major}{minor}"]
    return ", ".join([*parts, language.told()])
