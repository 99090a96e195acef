"""A step through the parts of a model that lie on different ranks, by DeepSpeed's pipeline engine (1F1B).

    part 0   F0 F1 F2    B0 F3 B1 ...        F: forward of a micro-batch, B: backward; hidden states go to the right,
    part 1      F0 F1 B0 F2 B1 ...           their gradients to the left

All ranks of a pipeline read the same windows, so hidden states are all that is sent: each part makes positions and
documents of a micro-batch for itself. To DeepSpeed each part is one layer. What we correct: a tied embedding is two
parameters, on the first part and on the last, whose gradients are added here. What a method has put beside the hidden
states, in a hook of the model, travels with them as a tuple.

B windows, S sequence length, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpt.engine.micro_batches import LossOf, MicroBatch, cut, put_here
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import fingerprint
from cpt_kernels.documents import num_counting

# DeepSpeed would send each tensor rank's share of the hidden states and join them again. Ranks have them whole, and
# not alike once norms are cut between positions.
DEEPSPEED_SETTINGS = {"pipe_partitioned": False, "grad_partitioned": False}


class Part(nn.Module):
    """This rank's part of a model as DeepSpeed's one layer; which micro-batch comes next it knows by their order."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self.model = model
        self.waiting: deque[MicroBatch] = deque()
        self.latest: MicroBatch | None = None
        self._is_first, self._watch = mesh.is_first_part, mesh.watch

    def forward(self, given: Tensor) -> Tensor:
        """Hidden states [B, S, D] of the part before -> those for the next, or losses; the first part reads tokens.

        In place of hidden states a tuple that begins with them, where hooks of the model make one and take it.
        """
        self._watch.still_alive()  # parts do not take micro-batches at the same time, nor forward and backward in turn
        self.latest = self.waiting.popleft()
        made = self.model(*self.latest.inputs, hidden=None if self._is_first else given)
        hidden = made[0] if isinstance(made, tuple) else made
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._watch.still_alive())  # as its backward begins
        return made


@dataclass
class TiedGradient:
    """The gradient of a weight that lies on two parts, for DeepSpeed to add up there: wherever its optimiser keeps it.

    DeepSpeed looks for `grad` alone. At stage 1, where gradients are summed in another type than that of the weights
    (fp16, or bf16 with offloading), it is empty by then, and the two copies would go different ways.
    """

    weight: nn.Parameter
    optimizer: Any = None  # known once the engine is made

    @property
    def grad(self) -> Tensor | None:
        """What is summed so far over the micro-batches."""
        kept = getattr(self.optimizer, "get_param_gradient_attribute", None)
        return kept(self.weight) if kept else self.weight.grad

    @property
    def _hp_grad(self) -> Tensor | None:  # of BF16_Optimizer: bf16 without offloading
        return self.weight._hp_grad


class Pipeline:
    """Takes the micro-batches of a step through all parts. Hand `module` to `deepspeed.initialize`, then `use`."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self._mesh, self._part = mesh, Part(model, mesh)
        # The one of a tied pair that lies here, on the first or the last part; else None.
        is_tied_here = model.settings.tied and (mesh.is_first_part or mesh.is_last_part)
        self._tied = model.embedding.weight if is_tied_here else None
        self._tied_gradient = None if self._tied is None else TiedGradient(self._tied)
        self.module = _module(self._part, self._tied_gradient, self._loss, mesh)
        if self._tied is not None:
            self._tied.ds_pipe_replicated = mesh.is_last_part  # counts once in the norm of all gradients
        self._loss_of: LossOf | None = None

    def use(self, engine: Any) -> None:
        """Run on this DeepSpeed engine, which was made around `module`."""
        self._engine = engine
        if self._tied_gradient is not None:
            self._tied_gradient.optimizer = engine.optimizer

    def train(self, micro_batches: Sequence[MicroBatch], loss_of: LossOf) -> None:
        """Forward and backward of all, and the update. `loss_of` is called on the last part only."""
        self._loss_of = loss_of
        self._engine.train_batch(self._announce(micro_batches))

    def token_losses(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        """Losses of windows `tokens` [B, S + 1], fp32 [B, S] on the device, the same on all ranks that read them."""
        counts = num_counting(tokens, starts)
        micro_batches = cut(tokens, counts, starts, counts, len(tokens), self._mesh.device)
        whole = torch.zeros(len(tokens), tokens.shape[1] - 1, device=self._mesh.device)

        def keep(micro_batch: MicroBatch, losses: Tensor) -> Tensor:
            put_here(losses, whole, self._mesh)
            return losses.mean()

        self._loss_of = keep
        self._engine.eval_batch(
            self._announce(micro_batches), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        self._engine.train()
        for group in (self._mesh.sequence, self._mesh.pipeline):  # parts without the head add zeros
            if group.size > 1:
                torch.distributed.all_reduce(whole, group=group.handle)
        return whole

    def differing_copies(self) -> list[str]:
        """The name of a tied embedding that is not the same on both of its parts; both must call it."""
        if self._tied is None:
            return []
        here = torch.tensor(fingerprint(self._tied.detach()), device=self._mesh.device)
        both = [torch.empty_like(here) for _ in range(2)]
        torch.distributed.all_gather(both, here, group=self._mesh.ends.handle)
        return [] if torch.equal(*both) else ["embedding.weight"]

    def _announce(self, micro_batches: Sequence[MicroBatch]) -> Any:
        """Let the part know what comes; as many empty batches, which is what DeepSpeed reads."""
        self._part.waiting.extend(micro_batches)
        # Shapes are told once a step: batches may grow, and a method may send more in training than evaluations do.
        self._engine.reset_activation_shape()
        empty = torch.empty(0)
        return iter([(empty, empty)] * len(micro_batches))

    def _loss(self, losses: Tensor, _: Tensor) -> Tensor:
        return self._loss_of(self._part.latest, losses)


def _module(part: Part, tied: TiedGradient | None, loss: Any, mesh: Mesh) -> Any:
    """DeepSpeed's pipeline of one layer a part."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class Module(PipelineModule):
        def get_tied_weights_and_groups(self) -> list[tuple[TiedGradient, Any]]:
            return [] if tied is None else [(tied, mesh.ends.handle)]

    # `initialize` would do it, too late for the module.
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False, dist_init_required=False)
    grid = PipeModelDataParallelTopology(mesh.pipeline.size, mesh.tensor.size, mesh.same_parameters.size)
    return Module([part] * mesh.pipeline.size, topology=grid, loss_fn=loss, partition_method="uniform")
