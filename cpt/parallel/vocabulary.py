"""Embedding, head and cross-entropy of which each rank of a tensor group has some of the vocabulary's rows.

The cross-entropy never has the logits of the whole vocabulary anywhere: each rank takes the logsumexp of its own, and
three numbers a token are sent.

    logits of this rank --> their logsumexp, the target's logit if it is here --> all ranks --> loss of each token

T tokens, B sequences, S positions, D width, V vocabulary, R rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpt.parallel.mesh import Group
from cpt.parallel.parts import Part
from cpt.parallel.tensor import WHOLE, Stream, joined
from cpt_kernels import logits
from cpt_kernels.cross_entropy import IGNORED, logits_at_once
from cpt_kernels.logits import OfLogits

# What a method computes where the head computes losses: of hidden [B, S, D] and weight [R, D], the rows of this rank.
Beside = Callable[[Tensor, Tensor], Any]


def rows_of(vocabulary: int, group: Group) -> tuple[int, int, int]:
    """(first row, last + 1, rows with padding) of this rank.

    All ranks have as many rows with padding, so that what comes behind them in memory lies at the same place on all
    and is computed with alike, to the bit. The last ranks may have padding only.
    """
    rows = -(-vocabulary // group.size)
    return min(vocabulary, group.rank * rows), min(vocabulary, (group.rank + 1) * rows), rows


class VocabularyEmbedding(nn.Module):
    """Rows of the tokens that are here, 0 for all others, summed over the group."""

    def __init__(self, whole: nn.Embedding, group: Group, stream: Stream = WHOLE) -> None:
        super().__init__()
        self.group, self.stream = group, stream
        self.first, self.last, rows = rows_of(whole.num_embeddings, group)
        self.weight = nn.Parameter(whole.weight.new_zeros(rows, whole.embedding_dim))
        self.parts = {"weight": Part(tuple(whole.weight.shape), 0, self.first, self.last)}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> [B, S, D], the same on all ranks, or its positions of it on each."""
        is_elsewhere = (tokens < self.first) | (tokens >= self.last)
        rows = functional.embedding((tokens - self.first).masked_fill(is_elsewhere, 0), self.weight)
        return self.stream.leave(rows.masked_fill(is_elsewhere[..., None], 0.0), self.group)


class VocabularyHead(nn.Module):
    """Projects onto the rows that are here. A tied one hands in the embedding's own Parameter, which has two owners."""

    def __init__(
        self,
        weight: Tensor,
        group: Group,
        tied_to: nn.Parameter | None = None,
        stream: Stream = WHOLE,
        by: OfLogits = logits.PLAIN,
    ) -> None:
        super().__init__()
        self.group, self.stream, self.vocabulary, self.by = group, stream, weight.shape[0], by
        self.beside: Beside | None = None
        self.first, self.last, rows = rows_of(self.vocabulary, group)
        self.weight = nn.Parameter(weight.new_zeros(rows, weight.shape[1])) if tied_to is None else tied_to
        self.parts = {"weight": Part(tuple(weight.shape), 0, self.first, self.last)}

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Any:
        """hidden [B, S, D] -> logits [B, S, V]; with targets [B, S] -> losses [B, S] in fp32. The same on all ranks.

        hidden of all positions, or of this rank's, as the stream is; targets are of all. With something `beside`, as
        the head for one device has it.
        """
        hidden, weight = self.stream.enter(hidden, self.group), self.weight[: self.last - self.first]
        if targets is None:
            if self.beside is not None:
                return self.beside(hidden, weight)
            return joined(functional.linear(hidden, self.weight), self.group)[..., : self.vocabulary]
        losses = linear_cross_entropy(hidden, weight, targets, self.first, self.group, by=self.by)
        if self.beside is None or not self.training:
            return losses
        return losses, self.beside(hidden, weight).masked_fill(targets == IGNORED, 0.0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: int,
    group: Group,
    tokens_at_once: int | None = None,
    z_loss: float = 0.0,
    by: OfLogits = logits.PLAIN,
) -> Tensor:
    """-log softmax(hidden whole_weight^T)[target] of each token, of which each rank has rows from `first` on.

    hidden [..., D], weight [R, D] (R may be 0), targets [...] int64 of the whole vocabulary (IGNORED costs nothing) ->
    losses [...], fp32 at least, the same on all ranks. The gradient of `hidden` is this rank's part of it: hand in what
    is `copied`. No more than `tokens_at_once` x R logits exist at a time; the backward pass makes them again. `z_loss`
    is as in `cpt_kernels.cross_entropy`, `by` what computes on the logits that are here.
    """
    tokens_at_once = tokens_at_once or max(1, logits_at_once(weight.device) // max(1, weight.shape[0]))
    is_ignored = targets.flatten() == IGNORED
    places = targets.flatten() - first
    places = places.masked_fill(is_ignored | (places < 0) | (places >= weight.shape[0]), -1)
    losses = _CrossEntropy.apply(hidden.flatten(0, -2), weight, places, is_ignored, group, (z_loss, tokens_at_once), by)
    return losses.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """`places` [T]: row of each token's target on this rank, -1 if it is elsewhere or none."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        places: Tensor,
        is_ignored: Tensor,
        group: Group,
        numbers: tuple[float, int],
        by: OfLogits,
    ) -> Tensor:
        z_loss, tokens_at_once = numbers
        here, chosen = logits.statistics_of(by, hidden, weight, places, tokens_at_once)  # of this rank's rows, [T]
        largest = here.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.handle)
        both = torch.stack([(here - largest).exp(), chosen])  # [2, T]
        dist.all_reduce(both, group=group.handle)
        logsumexps = both[0].log() + largest
        ctx.save_for_backward(hidden, weight, places, logsumexps, is_ignored)
        ctx.numbers, ctx.by = numbers, by
        return logits.losses_of(logsumexps, both[1], is_ignored, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, is_ignored = ctx.saved_tensors
        upstream = upstream.masked_fill(is_ignored, 0.0)
        gradients = logits.gradients_of(ctx.by, *inputs, upstream, *ctx.numbers, ctx.needs_input_grad[:2])
        return *gradients, None, None, None, None, None
