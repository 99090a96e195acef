"""SwiGLU: the gate of Llama's feed-forward layer.

M feed-forward width; any number of dimensions before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpt_kernels.language import Variant, is_left_to_torch, jit, tl, why_not
from cpt_kernels.self_check import difference

# Of a program, 16 a thread: two loads of 16 bytes from each tensor.
_ENTRIES_AT_ONCE = 2048


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, entry by entry; gate and up [..., M] -> [..., M].

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return functional.silu(gate) * up


def triton(gate: Tensor, up: Tensor) -> Tensor:
    """The same in fp32 and rounded once, one Triton kernel each way.

    Keeps its inputs alone. Bytes an entry of 2 bytes: 6 forward, 10 backward. Left to `plain`: float64, and what
    torch.compile traces.
    """
    return plain(gate, up) if is_left_to_torch(gate) else _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        gated = torch.empty_like(gate)
        if gate.numel():
            _forward[_grid(gate)](gate, up, gated, gate.numel(), _ENTRIES_AT_ONCE, num_warps=4)
        ctx.save_for_backward(gate, up)
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            _backward[_grid(gate)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), _ENTRIES_AT_ONCE, num_warps=4
            )
        return grad_gate, grad_up


def _grid(tensor: Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _ENTRIES_AT_ONCE),)


@jit
def _forward(gate, up, gated, number, BLOCK: tl.constexpr):
    """One program: BLOCK entries."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < number
    x = tl.load(gate + places, mask=is_inside, other=0.0).to(tl.float32)
    y = tl.load(up + places, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(gated + places, (x * tl.sigmoid(x) * y).to(gated.dtype.element_ty), mask=is_inside)


@jit
def _backward(grad, gate, up, grad_gate, grad_up, number, BLOCK: tl.constexpr):
    """One program: BLOCK entries."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < number
    upstream = tl.load(grad + places, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.load(gate + places, mask=is_inside, other=0.0).to(tl.float32)
    y = tl.load(up + places, mask=is_inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    silu = x * share
    of_gate = upstream * y * (share + silu * (1.0 - share))
    tl.store(grad_gate + places, of_gate.to(grad_gate.dtype.element_ty), mask=is_inside)
    tl.store(grad_up + places, (upstream * silu).to(grad_up.dtype.element_ty), mask=is_inside)


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "triton": triton}
_NARROW = "*bf16:16"
COMPILED = [
    Variant(_forward, {**dict.fromkeys(("gate", "up", "gated"), _NARROW), "number": "i32:16"},
            {"BLOCK": _ENTRIES_AT_ONCE}),
    Variant(_backward, {**dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), _NARROW), "number": "i32:16"},
            {"BLOCK": _ENTRIES_AT_ONCE}),
]  # fmt: skip


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type != "cuda":
        return plain, "plain (torch has no kernel of it)"
    reason = why_not(device)
    return (plain, f"plain ({reason})") if reason else (triton, "triton (one kernel each way, where plain has five)")


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    faults = (difference(triton, plain, [(37, 193), (37, 193)], t, device) for t in (torch.float32, torch.bfloat16))
    return next(filter(None, faults), None)
