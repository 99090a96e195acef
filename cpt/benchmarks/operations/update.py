"""A whole update of flat fp32 masters: norm and clipping, AdamW, the copy in bf16; gradients are fp32.

The plain way is DeepSpeed's, a pass over memory each: norm, clip, AdamW, copy, gradients to zero. Every twin of AdamW
is measured inside it, and the one kernel that does all but the norm.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, adamw
from cpt_kernels import adamw as twins_of_adamw
from cpt_kernels import adamw_update

IS_UPDATE = True
PEERS: dict[str, Peer] = {}
serves, arguments = adamw.serves, adamw.arguments
_CLIP, _BETAS, _EPSILON, _RATE, _DECAY = 1.0, (0.9, 0.95), 1e-8, 1e-2, 0.1
# Reptile's share of the way that is kept, in the form with a pull.
KEPT = 0.5
# Changes masters by a gradient, in place.
Update = Callable[[Tensor], None]


def in_passes(make: Callable[..., Any], masters: Tensor, anchor: Tensor | None, clip: float = _CLIP) -> Update:
    """As DeepSpeed does it around an optimiser of this kind."""
    parameter = torch.nn.Parameter(masters)
    optimizer = make([{"params": [parameter], "weight_decay": _DECAY}], _RATE, _BETAS, _EPSILON)
    copy, spare = masters.bfloat16(), torch.empty_like(masters)

    @torch.no_grad()
    def update(gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
        parameter.grad = gradient
        optimizer.step()
        if anchor is not None:
            masters.sub_(anchor).mul_(KEPT).add_(anchor)
            anchor.copy_(masters)
        copy.copy_(masters)
        spare.zero_()  # in the place of the gradient, which is needed again

    return update


def in_one_kernel(masters: Tensor, anchor: Tensor | None) -> Update:
    """The norm, then everything in one pass through Triton."""
    means, squares, copy = torch.zeros_like(masters), torch.zeros_like(masters), masters.bfloat16()
    step = torch.zeros((), device=masters.device)

    @torch.no_grad()
    def update(gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient)
        step.add_(1)
        adamw_update.update(
            [masters], [gradient], [means], [squares], step, learning_rate=_RATE, betas=_BETAS, epsilon=_EPSILON,
            weight_decay=_DECAY, clip=torch.clamp(_CLIP / (norm + 1e-6), max=1.0), weights=[copy],
            anchors=None if anchor is None else [anchor], kept=1.0 if anchor is None else KEPT,
        )  # fmt: skip

    return update


TWINS = {name: functools.partial(in_passes, make) for name, make in twins_of_adamw.TWINS.items()}
KERNEL = SimpleNamespace(
    TWINS=TWINS | {"triton in one kernel": in_one_kernel},
    # What serves is DeepSpeed's sequence around the twin that serves.
    face=lambda device: next(
        (TWINS[name], name) for name, make in twins_of_adamw.TWINS.items() if make is twins_of_adamw.face(device)[0]
    ),
)


def prepared(function: Callable[..., Update], arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    """The next update; gives the masters after it."""
    return prepared_with(function, arguments, None)


def prepared_with(
    function: Callable[..., Update], arguments: tuple[Any, ...], anchor: Tensor | None
) -> Callable[[], Tensor]:
    """The same, pulled to `anchor` where there is one."""
    masters, gradients = arguments[0].clone(), itertools.cycle(arguments[1:])
    update = function(masters, anchor)

    def step() -> Tensor:
        update(next(gradients))
        return masters

    return step


def compiled(plain: Callable[..., Update]) -> Callable[..., Update]:
    """The plain passes as one function, compiled."""
    return lambda masters, anchor: torch.compile(plain(masters, anchor))


def work(size: Size, dtype: torch.dtype) -> tuple[Work, None]:
    """Gradients are read for the norm and again; masters and moments read and written; the copy written: 34 bytes."""
    return Work(34.0 * adamw.num_parameters(size)), None
