"""AdamW: the optimiser's update, one element at a time independent of all others.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    w <- w - rate decay w - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

Both twins are `torch.optim.AdamW` itself and no subclass: DeepSpeed knows that class, and shards it without being told
that it may.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def plain(
    param_groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """An optimiser that updates parameter after parameter, operation after operation.

    A group decays only if it has its own `weight_decay`.
    """
    return _adamw(param_groups, learning_rate, betas, epsilon, fused=False)


def fused(
    param_groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """The same in one pass over memory."""
    return _adamw(param_groups, learning_rate, betas, epsilon, fused=True)


def _adamw(param_groups, learning_rate, betas, epsilon, fused: bool) -> torch.optim.AdamW:
    # weight_decay: torch's own default is 0.01, which would decay a group that says nothing.
    return torch.optim.AdamW(
        list(param_groups), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0, foreach=False, fused=fused
    )


TWINS: dict[str, Callable[..., torch.optim.AdamW]] = {"plain": plain, "torch": fused}


def face(device: torch.device) -> tuple[Callable[..., torch.optim.AdamW], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type in ("cpu", "cuda"):
        return fused, "torch (fused, one pass over memory)"
    return plain, f"plain (torch's fused AdamW is not known to work on {device.type})"
