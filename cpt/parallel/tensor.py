"""Layers that are spread over the ranks of a tensor group, and the two sums that hold them together.

    hidden --copied--> column-cut layers --> ... --> row-cut layer --summed--> hidden
      the same on all ranks    each rank its own heads, or entries of the MLP    the same on all ranks again

`copied` and `summed` are each other's gradient: what is the same on all ranks forward has gradients that differ, which
must be added; what is added forward has the same gradient everywhere.
Source: Shoeybi et al. 2019, arXiv:1909.08053 (Megatron-LM).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cpt.parallel.mesh import Group
from cpt.parallel.parts import Part


def copied(tensor: Tensor, group: Group) -> Tensor:
    """The same, where each rank of the group goes on to do something else with it: gradients are added."""
    return _Copied.apply(tensor, group)


def summed(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of the group, on each of them."""
    return _Summed.apply(tensor, group)


def joined(tensor: Tensor, group: Group) -> Tensor:
    """[..., N] of each rank behind one another, [..., size x N], on each of them."""
    return _Joined.apply(tensor, group)


def with_gradient_of_copies(tensor: Tensor, group: Group, num_copies: int) -> Tensor:
    """The same, where `num_copies` neighbours in the group hold equal tensors: the gradient is the sum of theirs."""
    return _OfCopies.apply(tensor, group, num_copies)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _total(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        return _total(tensor, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.width = group, tensor.shape[-1]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, tensor.contiguous(), group=group.handle)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.group.rank * ctx.width, ctx.width), None


class _OfCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group, num_copies: int) -> Tensor:
        ctx.group, ctx.num_copies = group, num_copies
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        # One sum over the whole group, each part in a place of its own: no further groups, for what is small.
        places = gradient.new_zeros(ctx.group.size // ctx.num_copies, *gradient.shape)
        here = ctx.group.rank // ctx.num_copies
        places[here] = gradient
        dist.all_reduce(places, group=ctx.group.handle)
        return places[here], None, None


def _total(tensor: Tensor, group: Group) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.handle)
    return total


class ColumnLinear(nn.Module):
    """Some of the outputs of a linear layer, of inputs that are `copied`.

    `num_copies` neighbours in the group compute the same outputs, each for other layers behind it.
    """

    def __init__(self, whole: nn.Linear, part: Part, group: Group, num_copies: int = 1) -> None:
        super().__init__()
        self.group, self.num_copies = group, num_copies
        rows = part.last - part.first
        self.weight = nn.Parameter(whole.weight.new_zeros(rows, whole.in_features))
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.new_zeros(rows))
        self.parts = {"weight": part}
        if whole.bias is not None:
            self.parts["bias"] = Part(part.shape[:1], 0, part.first, part.last, part.is_first_copy)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., rows of this rank]."""
        weight, bias = self.weight, self.bias
        if self.num_copies > 1:
            weight = with_gradient_of_copies(weight, self.group, self.num_copies)
            bias = None if bias is None else with_gradient_of_copies(bias, self.group, self.num_copies)
        return functional.linear(hidden, weight, bias)


class RowLinear(nn.Module):
    """A linear layer of which each rank takes some of the inputs; the bias, which is whole, is added after the sum."""

    def __init__(self, whole: nn.Linear, part: Part, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(whole.weight.new_zeros(whole.out_features, part.last - part.first))
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.new_zeros(whole.out_features))
        self.parts = {"weight": part}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., columns of this rank] -> [..., D], the same on all ranks."""
        total = summed(functional.linear(hidden, self.weight), self.group)
        return total if self.bias is None else total + self.bias
