"""AdamW on flat fp32 weights, as ZeRO gives it to the optimiser: no norm, no clipping, no copy in low precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpt.benchmarks.operations import Peer, Size, Work, random
from cpt_kernels import adamw

KERNEL = adamw
IS_UPDATE = True
_BETAS, _EPSILON, _RATE, _DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.1
# 12 bytes of state and 4 of gradient each: enough to fill a GPU, and little to wait for.
_MOST_PARAMETERS = 1 << 28


def serves(size: Size) -> bool:
    """All models."""
    return True


def arguments(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Any, ...]:
    """weights [P] and the gradients [P] of two steps, in fp32 whatever the type of the model."""
    shape = (num_parameters(size),)
    return tuple(random(shape, torch.float32, device, seed + i).detach() for i in range(3))


def num_parameters(size: Size) -> int:
    """Of the model, up to a bound."""
    return min(size.num_parameters, _MOST_PARAMETERS)


def prepared(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Tensor]:
    """A step of the optimiser that `function` makes of parameter groups; gives the weights after it."""
    weights, gradients = torch.nn.Parameter(arguments[0].clone()), itertools.cycle(arguments[1:])
    optimizer = function([{"params": [weights], "weight_decay": _DECAY}], _RATE, _BETAS, _EPSILON)

    def step() -> Tensor:
        weights.grad = next(gradients)
        optimizer.step()
        return weights.detach()

    return step


def work(size: Size, dtype: torch.dtype) -> tuple[Work, None]:
    """Weights and two moments are read and written, gradients read: 28 bytes a parameter."""
    return Work(28.0 * num_parameters(size)), None


def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The plain twin, its step compiled."""

    def made(*words: Any) -> Any:
        optimizer = plain(*words)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer

    return made


def _made_by(kind: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    return lambda groups, rate, betas, epsilon: kind(groups, lr=rate, betas=betas, eps=epsilon, **more)


def _foreach() -> Callable[..., Any]:
    return _made_by(torch.optim.AdamW, foreach=True)


def _apex() -> Callable[..., Any]:
    from apex.optimizers import FusedAdam

    return _made_by(FusedAdam)


def _transformer_engine() -> Callable[..., Any]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return _made_by(FusedAdam)


def _deepspeed_gpu() -> Callable[..., Any]:
    from deepspeed.ops.adam import FusedAdam

    return _made_by(FusedAdam)


def _deepspeed_cpu() -> Callable[..., Any]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return _made_by(DeepSpeedCPUAdam)


PEERS = {
    "torch foreach": Peer("torch", _foreach),
    "apex FusedAdam": Peer("apex", _apex, "cuda"),
    "Transformer Engine FusedAdam": Peer("transformer-engine", _transformer_engine, "cuda"),
    "DeepSpeed FusedAdam": Peer("deepspeed", _deepspeed_gpu, "cuda", builds="fused_adam"),
    "DeepSpeed CPU Adam": Peer("deepspeed", _deepspeed_cpu, "cpu", builds="cpu_adam"),
}
