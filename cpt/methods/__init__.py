"""How forgetting is held off: one file a method, hooked into the loop at five seams.

    before_batch   a step begins
    after_forward  losses of a micro-batch are known; a further loss may be added
    before_update  gradients are summed; the sharded fp32 masters can be read and written
    after_update   the update was made (not after one that was skipped)
    end_stage      a stage's tokens are spent

A file here opens with its frozen `Settings` and holds one class `Method(settings)`; it overrides the seams it needs.
At strength 0 a method leaves the run unchanged, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cpt.config import name_of_choice
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Masters
from cpt.progress import Progress


@dataclass(frozen=True)
class Forward:
    """A micro-batch after its forward pass: `tokens` [B, S + 1] and the `losses` [B, S] of its S targets, in nats.

    Where a target does not count, because it is the first token of a document, its loss is 0. Where ranks share the
    positions of a window (`mesh.sequence`), losses are those of this rank's positions, [B, S / sequence.size].
    """

    progress: Progress
    tokens: torch.Tensor
    losses: torch.Tensor
    # What the function that a method has put beside the head made of this micro-batch, [B, S], or None.
    beside: torch.Tensor | None = None
    # From numbers [B, S], 0 where a target does not count, to the scalar that a loss is made of: each target that
    # counts weighs the same, as in the loss itself.
    mean: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.mean


class Seams:
    """A method that does nothing at every seam; those that do something inherit from it.

    `progress` is always the place before the step.
    """

    # For the memory plan: fp32 values that the method keeps for each parameter, cut as the masters are, and where; and
    # copies in the model's precision that every replica has whole, which no checkpoint holds.
    num_copies = 0
    are_copies_on_host = False
    num_whole_copies = 0

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.name = name_of_choice(settings)

    def meet(self, model: nn.Module, make_model: Callable[[], nn.Module], masters: Masters, mesh: Mesh) -> None:
        """Before the first seam, once: this rank's part of the model, what makes another one, not filled, and the
        masters. Raises Fault on a mesh that the method does not work on.
        """

    def before_batch(self, progress: Progress) -> None:
        """A step begins."""

    def after_forward(self, forward: Forward) -> torch.Tensor | None:
        """A further loss (a scalar, mean over tokens here) to add to this micro-batch's, or None.

        Under fp16 a micro-batch comes again in each try of a step whose gradients overflowed.
        """
        return None

    def before_update(self, masters: Masters, progress: Progress) -> None:
        """Gradients are summed over ranks; what is written into the masters is what the update starts from."""

    def after_update(self, masters: Masters, progress: Progress) -> bool:
        """The update was made; True if the masters were written to, so that the model's weights are derived anew."""
        return False

    def end_stage(self, masters: Masters, progress: Progress) -> bool:
        """A stage has ended; True if the masters were written to."""
        return False

    def report(self) -> dict[str, float]:
        """Numbers for this step's line in `metrics.jsonl`, named `method/<name>/<what>`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: numbers, and lists of tensors, one tensor for each of the masters' pieces."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, on this or another mesh; nothing, if it was saved before there was any.

        What the method has kept since it gave that is forgotten: a run may go back.
        """
