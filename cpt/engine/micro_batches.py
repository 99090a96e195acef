"""The windows of a step in pieces that fit into memory, and who takes them forward and backward.

    windows of this rank --cut--> micro-batches --train(micro_batches, loss_of)--> gradients summed, update made

B windows, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpt.parallel.mesh import Mesh
from cpt.parallel.sequence import PositionsHere
from cpt_kernels import Documents
from cpt_kernels.documents import model_inputs, num_counting


@dataclass(frozen=True)
class MicroBatch:
    """`tokens` [B, S + 1] on the device; on the CPU the number of each window's source [B], how many of its targets
    count [B], and where documents begin [B, S + 1], None if that does not matter.
    """

    tokens: Tensor
    sources: Tensor
    counts: Tensor
    starts: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | Documents, ...]:
        """What the model is called with."""
        return model_inputs(self.tokens, self.starts, self.tokens.device)


# The loss to go backward from, a scalar, of a micro-batch and what the model returns: token losses, perhaps with more.
LossOf = Callable[[MicroBatch, Any], Tensor]


def cut(
    tokens: Tensor, sources: Tensor, starts: Tensor | None, counts: Tensor, size: int, device: torch.device
) -> list[MicroBatch]:
    """The windows `tokens` [B, S + 1] in micro-batches of `size`, on their way to the device."""
    tokens = tokens.to(device, non_blocking=True)
    parts = [slice(first, first + size) for first in range(0, len(tokens), size)]
    return [MicroBatch(tokens[p], sources[p], counts[p], None if starts is None else starts[p]) for p in parts]


def put_here(losses: Tensor, whole: Tensor, mesh: Mesh) -> None:
    """Copy the losses of this rank's positions [B, S / sequence.size] to where they stand in `whole` [B, S]."""
    PositionsHere(mesh.sequence)(whole).copy_(losses)


class OneByOne:
    """Takes one micro-batch after another through a model that has all its layers here. `engine` is DeepSpeed's."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh

    def train(self, micro_batches: Sequence[MicroBatch], loss_of: LossOf) -> None:
        """Forward and backward of each; the update is made after the last."""
        for micro_batch in micro_batches:
            self._mesh.watch.alive()
            outputs = self._engine(*micro_batch.inputs)
            self._engine.backward(loss_of(micro_batch, outputs))
            self._engine.step()

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        """Losses of windows `tokens` [B, S + 1], fp32 [B, S] on the device, the same on all ranks that read them."""
        counts = num_counting(tokens, starts)
        (micro_batch,) = cut(tokens, counts, starts, counts, len(tokens), self._mesh.device)
        self._engine.eval()
        losses = self._engine(*micro_batch.inputs)  # [B, S / sequence.size]
        self._engine.train()
        if self._mesh.sequence.size == 1:
            return losses
        whole = torch.zeros(len(tokens), tokens.shape[1] - 1, device=self._mesh.device)
        put_here(losses, whole, self._mesh)
        torch.distributed.all_reduce(whole, group=self._mesh.sequence.handle)
        return whole

    def differing_copies(self) -> list[str]:
        """Nothing lies twice along an axis of the mesh that is not here."""
        return []
