"""Windows of which each rank of a sequence group computes some positions; for attention it has all, of some heads.

    [B, S / size, all heads] --exchanged--> [B, S, heads / size] --attention--> [B, S, heads / size] --exchanged--> back

Whatever is not attention treats each position by itself and needs nothing of the others. Positions and the beginnings
of documents are those of the whole window, on every rank.

DeepSpeed has the same in `deepspeed.sequence.layer.DistributedAttention` (a test holds ours against it). Ours sends
queries, keys and values in one collective and not in three, takes fewer key and value heads than ranks, and is given
documents and rotary angles of whole windows.

B sequences, S positions, H query heads, G key and value heads, K head width.
Source: Jacobs et al. 2023, arXiv:2309.14509 (DeepSpeed-Ulysses).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpt.parallel.mesh import Group
from cpt_kernels import Documents

# (queries [B, S, H, K], keys, values [B, S, G, K], angles, documents) -> [B, S, H, K]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Documents | None], Tensor]


class PositionsHere(nn.Module):
    """Takes this rank's positions of whole windows: neighbours, the first rank the first ones."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [B, S / size]."""
        assert tokens.shape[1] % self.group.size == 0, "sequence_length is told to be divisible before ranks meet"
        num_here = tokens.shape[1] // self.group.size
        return tokens[:, self.group.rank * num_here : (self.group.rank + 1) * num_here]


class AttentionOverRanks(nn.Module):
    """`attend` for queries, keys and values of this rank's positions, by exchanging positions for heads and back."""

    def __init__(self, attend: Attend, group: Group) -> None:
        super().__init__()
        self.attend, self.group = attend, group

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, angles: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """queries [B, S / size, H, K], keys and values [B, S / size, G, K] -> [B, S / size, H, K].

        `size` must divide H. angles and documents are of all S positions.
        """
        size = self.group.size
        # Until they can be dealt out; where they are fewer than ranks, nobody is sent more than it needs.
        repeats = size // math.gcd(keys.shape[2], size)
        if repeats > 1:
            keys, values = (heads.repeat_interleave(repeats, dim=2) for heads in (keys, values))
        shares = [heads.unflatten(2, (size, -1)) for heads in (queries, keys, values)]  # each [B, S / size, size, h, K]
        widths = [share.shape[3] for share in shares]
        sent = torch.cat(shares, dim=3).permute(2, 0, 1, 3, 4)  # [size, B, S / size, all h, K]
        received = exchanged(sent, self.group).transpose(0, 1).flatten(1, 2)  # [B, S, all h, K]
        mixed = self.attend(*received.split(widths, dim=2), angles, documents)  # [B, S, H / size, K]
        sent = mixed.unflatten(1, (size, -1)).transpose(0, 1)  # [size, B, S / size, H / size, K]
        return exchanged(sent, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged(tensor: Tensor, group: Group) -> Tensor:
    """[size, ...]: entry i goes to rank i of the group, and entry j of what comes back is from rank j."""
    return _Exchanged.apply(tensor, group)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _exchange(tensor, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(tensor: Tensor, group: Group) -> Tensor:
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group.handle)
    return received
