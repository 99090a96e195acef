"""The operations that `cpt bench kernels` measures, one file each; the file's name is the operation's.

A file holds
    KERNEL                          the operation's file in cpt_kernels, whose TWINS are measured
    PEERS                           what others have for it, by name
    serves(size)                    whether models of that kind have this operation
    arguments(size, dtype, device, seed)
                                    what a twin is called with; tensors that require gradients get them
    prepared(function, arguments)   the call that is timed; gives a tensor or a tuple of them
    work(size, dtype)               what forward and backward cannot do without; no backward: None
    IS_UPDATE                       where it is an optimiser's step and has no backward pass
A new twin in cpt_kernels is measured without a change here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cpt.models import pythia


@dataclass(frozen=True)
class Work:
    """Fewest bytes that are read and written, and FLOPs. `overlaps`: one can be done while the other is."""

    num_bytes: float
    flops: float = 0.0
    overlaps: bool = True

    def microseconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time that it takes at these rates."""
        moving, computing = self.num_bytes / bytes_per_second, self.flops / flops_per_second
        return 1e6 * (max(moving, computing) if self.overlaps else moving + computing)


@dataclass(frozen=True)
class Peer:
    """What a library has in the place of a twin. `bring()` imports it and gives a function that is called as twins are.

    `package`: as it is installed. `device`: the only kind that it runs on. `builds`: what torch compiles for minutes
    before it serves, unless that was done before.
    """

    package: str
    bring: Callable[[], Callable[..., Any]]
    device: str | None = None
    builds: str | None = None


@dataclass(frozen=True)
class Size:
    """How large an operation is: one micro-batch of a model. `document_tokens`: mean length of documents."""

    name: str
    is_pythia: bool
    windows: int
    positions: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    rotary_width: int
    mlp_width: int
    vocabulary: int
    num_parameters: int

    @classmethod
    def of_model(cls, name: str, model: Any, windows: int, positions: int) -> Size:
        """One micro-batch of `windows` of a model by its settings."""
        return cls(
            name, isinstance(model, pythia.Settings), windows, positions, model.width, model.heads,
            model.num_kv_heads, model.width_of_head, model.rotary_width, model.width_of_mlp, model.vocabulary,
            model.num_parameters,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.windows * self.positions

    @property
    def document_tokens(self) -> int:
        """Mean length of documents: a quarter of a window, 1000 at most."""
        return min(1000, self.positions // 4)

    @property
    def sample(self) -> Size:
        """A few tokens of the same widths and fewer words, odd numbers of both, to see whether a way is right."""
        return dataclasses.replace(
            self, windows=2, positions=37, vocabulary=min(self.vocabulary, 1009), num_parameters=1013
        )


def random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers that need a gradient, the same on every device."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) if device.type == "cpu" else None
    if made is None:
        made = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))
    return (made * scale).to(dtype).requires_grad_()


def called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """The call itself: what most operations time."""
    return lambda: function(*arguments)
