"""GELU: the activation of GPT-NeoX's feed-forward layer, exact or by a tanh.

M feed-forward width; any number of dimensions before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpt_kernels.language import Variant, is_left_to_torch, jit, tl
from cpt_kernels.self_check import difference

# Of a program, 16 a thread: two loads of 16 bytes from each tensor.
_ENTRIES_AT_ONCE = 2048


def plain(hidden: Tensor, is_tanh: bool = False) -> Tensor:
    """x times the normal distribution function of x, [..., M] -> [..., M]; in fp32 at least, rounded once at the end.

    With `is_tanh` the function is replaced by (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, which differs by up to
    5e-4: weights trained with one must not be used with the other.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if is_tanh:
        share = torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    else:
        share = torch.erf(wide * math.sqrt(0.5))
    return (0.5 * wide * (1 + share)).to(hidden.dtype)


def fused(hidden: Tensor, is_tanh: bool = False) -> Tensor:
    """The same through torch's gelu: one kernel forward and one backward."""
    return functional.gelu(hidden, approximate="tanh" if is_tanh else "none")


def triton(hidden: Tensor, is_tanh: bool = False) -> Tensor:
    """The same, one Triton kernel each way. Left to `plain`: float64, and what torch.compile traces.

    Keeps its input alone. Bytes an entry of 2 bytes: 4 forward, 6 backward.
    """
    return plain(hidden, is_tanh) if is_left_to_torch(hidden) else _Gelu.apply(hidden, is_tanh)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, is_tanh):
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        if hidden.numel():
            _forward[_grid(hidden)](hidden, out, hidden.numel(), is_tanh, _ENTRIES_AT_ONCE, num_warps=4)
        ctx.save_for_backward(hidden)
        ctx.is_tanh = is_tanh
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (hidden,) = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        if hidden.numel():
            _backward[_grid(hidden)](
                grad.contiguous(), hidden, grad_hidden, hidden.numel(), ctx.is_tanh, _ENTRIES_AT_ONCE, num_warps=4
            )
        return grad_hidden, None


def _grid(tensor: Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _ENTRIES_AT_ONCE),)


@jit
def _forward(hidden, out, number, IS_TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK entries."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < number
    x = tl.load(hidden + places, mask=is_inside, other=0.0).to(tl.float32)
    if IS_TANH:  # (1 + tanh(u)) / 2 is sigmoid(2 u); 1.5957691 is 2 sqrt(2 / pi)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    tl.store(out + places, (x * share).to(out.dtype.element_ty), mask=is_inside)


@jit
def _backward(grad, hidden, grad_hidden, number, IS_TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK entries."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < number
    upstream = tl.load(grad + places, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.load(hidden + places, mask=is_inside, other=0.0).to(tl.float32)
    if IS_TANH:
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # the normal density: 1 / sqrt(2 pi) before it
    tl.store(grad_hidden + places, (upstream * (share + x * slope)).to(grad_hidden.dtype.element_ty), mask=is_inside)


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "torch": fused, "triton": triton}
COMPILED = [
    Variant(kernel, {**dict.fromkeys(tensors, "*bf16:16"), "number": "i32:16"},
            {"IS_TANH": is_tanh, "BLOCK": _ENTRIES_AT_ONCE})
    for kernel, tensors in ((_forward, ("hidden", "out")), (_backward, ("grad", "hidden", "grad_hidden")))
    for is_tanh in (False, True)
]  # fmt: skip


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return fused, "torch (one kernel)"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    for is_tanh in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            pair = partial(triton, is_tanh=is_tanh), partial(plain, is_tanh=is_tanh)
            fault = difference(*pair, [(37, 193)], dtype, device)
            if fault:
                return fault
    return None
