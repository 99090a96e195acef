"""A whole update with the pull of Reptile: masters keep a share of their way from an anchor, which follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Size, Work, adamw, update

IS_UPDATE = True
KERNEL, PEERS, serves, arguments, compiled = (
    update.KERNEL, update.PEERS, update.serves, update.arguments, update.compiled,
)  # fmt: skip


def prepared(function: Callable[..., update.Update], arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    """The next update; gives the masters after it. The anchor begins where they do."""
    return update.prepared_with(function, arguments, arguments[0].clone())


def work(size: Size, dtype: torch.dtype) -> tuple[Work, None]:
    """As without, and the anchor read and written: 42 bytes a parameter."""
    return Work(42.0 * adamw.num_parameters(size)), None
