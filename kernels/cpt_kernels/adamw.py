"""AdamW: the optimiser's update, one element at a time independent of all others.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    w <- w - rate decay w - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

Two twins are `torch.optim.AdamW` itself, the third a subclass that keeps the same state by the same names. DeepSpeed
shards that class without being told that it may, and others where `zero_allow_untested_optimizer` says so.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cpt_kernels import adamw_update
from cpt_kernels.language import why_not
from cpt_kernels.self_check import off_by


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


def triton(
    param_groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """The same in one Triton kernel a tensor, which ZeRO's flat shards are few of.

    What DeepSpeed does around it in passes of its own (unscaling, clipping, the copy of 16 bits) can be in that pass
    too: see `cpt_kernels.adamw_update`.
    """
    return _adamw(param_groups, learning_rate, betas, epsilon, fused=False, kind=TritonAdamW)


def _adamw(param_groups, learning_rate, betas, epsilon, fused: bool, kind=torch.optim.AdamW) -> torch.optim.AdamW:
    # weight_decay: torch's own default is 0.01, which would decay a group that says nothing.
    return kind(
        list(param_groups), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0, foreach=False, fused=fused
    )


class TritonAdamW(torch.optim.AdamW):
    """torch's AdamW with an update of our own, for fp32 parameters in any order in memory but without gaps."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Raises ValueError, before any is updated, with a line for each reason for which one of them cannot be: where
        Triton's kernels do not run, what is not fp32, and what has gaps in memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        faults = dict.fromkeys(fault for parameter, _ in updates if (fault := _why_not_updated(parameter)))
        if faults:
            raise ValueError("\n".join(f"kernels.adamw = triton with {fault}" for fault in faults))
        for parameter, group in updates:
            self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        for name in ("exp_avg", "exp_avg_sq"):  # of a state that was loaded
            state[name] = _in_the_order_of(parameter, state[name])
        adamw_update.update(
            [parameter], [_in_the_order_of(parameter, parameter.grad)], [state["exp_avg"]], [state["exp_avg_sq"]],
            state["step"].to(parameter.device), learning_rate=float(group["lr"]), betas=group["betas"],
            epsilon=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip


def _why_not_updated(parameter: Tensor) -> str | None:
    reason = why_not(parameter.device)
    if reason is not None:
        return f"masters on {parameter.device}: {reason}; use torch"
    if parameter.dtype is not torch.float32:
        return f"a parameter of {parameter.dtype}: it updates torch.float32 alone; keep masters in fp32, or use torch"
    # empty_like keeps the strides of a tensor without gaps or overlaps, and of no other.
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        return (
            f"a parameter of shape {list(parameter.shape)} and strides {list(parameter.stride())}: there are gaps "
            "between its elements in memory; make it contiguous, or use torch"
        )
    return None


def _in_the_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with its elements in memory where the kernel, which sees memory alone, finds those of the parameter."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


TWINS: dict[str, Callable[..., torch.optim.AdamW]] = {"plain": plain, "torch": fused, "triton": triton}


def face(device: torch.device) -> tuple[Callable[..., torch.optim.AdamW], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type in ("cpu", "cuda"):
        return fused, "torch (fused, one pass over memory)"
    return plain, f"plain (torch's fused AdamW is not known to work on {device.type})"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` in two updates; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 1500, generator=generator).to(device)
    results = []
    for make in (triton, plain):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make([{"params": [parameter], "weight_decay": 0.1}], 0.01, (0.9, 0.95), 1e-8)
        for gradient in gradients:
            parameter.grad = gradient
            optimizer.step()
        results.append([parameter.detach(), *(optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))])
    found = (off_by(name, *pair) for name, *pair in zip(("master", "mean", "square"), *results, strict=True))
    return next(filter(None, found), None)
