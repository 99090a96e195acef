"""Layers that are spread over the ranks of a tensor group, and the two sums that hold them together.

    hidden --copied--> column-cut layers --> ... --> row-cut layer --summed--> hidden
      the same on all ranks    each rank its own heads, or entries of the MLP    the same on all ranks again

`copied` and `summed` are each other's gradient: what is the same on all ranks forward has gradients that differ, which
must be added; what is added forward has the same gradient everywhere.

    hidden --gathered--> column-cut layers --> ... --> row-cut layer --scattered--> hidden
      some positions on each rank    all positions    some positions on each rank again

The same with the stream between layers cut between positions: norms are computed once and not by every rank, and as
much is sent, for a sum is a scattered sum that is gathered. These two are each other's gradient as well.
Source: Shoeybi et al. 2019, arXiv:1909.08053 (Megatron-LM); Korthikanti et al. 2022, arXiv:2205.05198.

B sequences, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def gathered(tensor: Tensor, group: Group) -> Tensor:
    """[B, S / size, D] of each rank, the first rank's positions first -> [B, S, D]; gradients are added."""
    return _Gathered.apply(tensor, group)


def scattered(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of the group, of which each gets its positions: [B, S, D] -> [B, S / size, D]."""
    return _Scattered.apply(tensor, group)


@dataclass(frozen=True)
class Stream:
    """How hidden states lie between cut layers: what is done before a column-cut layer and after a row-cut one."""

    enter: Callable[[Tensor, Group], Tensor]
    leave: Callable[[Tensor, Group], Tensor]


# On each rank all positions, or its own.
WHOLE = Stream(copied, summed)
BETWEEN_POSITIONS = Stream(gathered, scattered)


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


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter(gradient, ctx.group), None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter(tensor, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.group), None


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


# Of newer torches; the older names say there that they will go.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gather(tensor: Tensor, group: Group) -> Tensor:
    parts = tensor.new_empty(group.size * len(tensor), *tensor.shape[1:])
    _all_gather(parts, tensor.contiguous(), group=group.handle)
    return parts.unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1, 2)


def _scatter(tensor: Tensor, group: Group) -> Tensor:
    parts = tensor.unflatten(1, (group.size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    total = parts.new_empty(len(tensor), *parts.shape[1:])
    _reduce_scatter(total, parts, group=group.handle)
    return total


def add_up_gradients(model: nn.Module) -> None:
    """Let the gradients of parameters that a tensor group holds alike, and uses for other positions on each rank, be
    added over it; which these are, layers say in `used_for_some_positions`.

    Once a backward pass and parameter, before anybody else sees the gradient.
    """

    def added(gradient: Tensor, group: Group) -> Tensor:
        return _total(gradient.float(), group).to(gradient.dtype)

    for layer in model.modules():
        for name, group in getattr(layer, "used_for_some_positions", {}).items():
            layer.get_parameter(name).register_hook(partial(added, group=group))


class ColumnLinear(nn.Module):
    """Some of the outputs of a linear layer, of inputs that have entered (see `Stream`).

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

    def __init__(self, whole: nn.Linear, part: Part, group: Group, stream: Stream = WHOLE) -> None:
        super().__init__()
        self.group, self.stream = group, stream
        self.weight = nn.Parameter(whole.weight.new_zeros(whole.out_features, part.last - part.first))
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.new_zeros(whole.out_features))
        self.parts = {"weight": part}

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, columns of this rank] -> [B, S, D], the same on all ranks, or its positions of it on each."""
        total = self.stream.leave(functional.linear(hidden, self.weight), self.group)
        return total if self.bias is None else total + self.bias
