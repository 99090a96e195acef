"""What torch.compile makes of blocks and of their operations: fewer passes over memory, about the same numbers.

Forward functions and kernels are exchanged in place, so that no parameter changes its name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpt.config import Fault

# Operations of a block that are many small ones. Products and attention are kernels already.
_OPERATIONS = ("rms_norm", "layer_norm", "rotary", "swiglu", "gelu")


# Inductor then begins to send as soon as what is sent is there, and waits when the outcome is used: sums over tensor
# ranks go on while gradients of weights are computed. Its order for the least memory, made last, would undo that.
_OVERLAPPING = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
    "reorder_for_peak_memory": False,
}


@dataclass(frozen=True)
class Settings:
    """`blocks`: whether blocks are compiled. `backend`: `aot_eager` needs no C++ compiler and saves nothing.

    `overlaps_sums`: let what tensor ranks send one another go on while gradients of weights are computed. Where
    blocks are compiled whole: not at ZeRO 3, nor with selective recomputation within documents.
    """

    blocks: bool = False
    backend: Literal["inductor", "aot_eager"] = "inductor"
    overlaps_sums: bool = False

    def faults(self) -> list[str]:
        """An order of work without the one who makes it."""
        if self.overlaps_sums and not (self.blocks and self.backend == "inductor"):
            return ["overlaps_sums = true: inductor orders the work so; set blocks = true and backend = inductor"]
        return []

    @property
    def words(self) -> dict[str, Any]:
        """What torch.compile is told."""
        return {"backend": self.backend, **({"options": _OVERLAPPING} if self.overlaps_sums else {})}


def refuse_broken(settings: Settings, device: torch.device) -> None:
    """Raise Fault if the backend does not work here, such as for want of a C++ compiler; tried on a small sum."""
    if not settings.blocks:
        return
    try:
        torch.compile(lambda numbers: numbers + 1, **settings.words)(torch.ones(3, device=device))
    except Exception as error:  # whatever a backend raises; it is told on
        reason = str(error).strip().splitlines() or [type(error).__name__]
        folder = os.path.dirname(torch.__file__)
        space = f"; torch lies in '{folder}', and a space in that path is not quoted" if " " in folder else ""
        raise Fault(
            f"compile.backend = {settings.backend}: it does not work on this machine ({reason[0]}{space}); leave "
            "compile out, or install what it needs: inductor compiles C++ on a CPU, and Triton's kernels on a GPU"
        ) from error


def compiled(forward: Callable[..., Tensor], settings: Settings) -> Callable[..., Tensor]:
    """`forward` of a block, compiled when it is first called."""
    return torch.compile(forward, **settings.words)


def compile_operations(block: nn.Module, settings: Settings) -> None:
    """Compile each operation of a block for itself, in place."""
    _change_kernels(block, lambda name, function: torch.compile(function, backend=settings.backend), _OPERATIONS)


def leave_documents_apart(block: nn.Module) -> None:
    """Let attention within documents run as it is in an otherwise compiled block, in place.

    What it does depends on the number and lengths of documents: it would be compiled anew for every batch.
    """
    _change_kernels(block, lambda name, function: _apart_with_documents(function), ("attention",))


def _apart_with_documents(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    apart = torch.compiler.disable(attention)

    def served(queries: Tensor, keys: Tensor, values: Tensor, documents: Any = None) -> Tensor:
        return attention(queries, keys, values) if documents is None else apart(queries, keys, values, documents)

    return served


def _change_kernels(block: nn.Module, change: Callable[[str, Callable], Callable], names: tuple[str, ...]) -> None:
    changed: dict[int, Any] = {}
    for layer in block.modules():
        kernels = getattr(layer, "kernels", None)
        if kernels is not None:
            if id(kernels) not in changed:
                functions = {name: change(name, getattr(kernels, name)) for name in names}
                changed[id(kernels)] = dataclasses.replace(kernels, **functions)
            layer.kernels = changed[id(kernels)]
