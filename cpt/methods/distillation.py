"""The model as it was when the stage began teaches the model that is trained: its predictions are to stay.

    loss := loss + strength * temperature^2 * mean over tokens of KL(teacher || model)

The teacher is kept in fp32 as pieces, sharded as the masters are, and computes from a copy in the model's own
precision, which every replica has whole (its part of it, on tensor ranks and on parts of a pipeline). Its hidden states
are compared with the model's at the head, where no logits are kept; between parts they travel beside the model's.
Source: Li and Hoiem 2016, arXiv:1606.09282 (learning without forgetting); Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpt.methods import Forward, Seams
from cpt.parallel.divergence import divergence
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Masters
from cpt.progress import Progress


@dataclass(frozen=True)
class Settings:
    """`strength` of the teacher's word against the text's; 0 changes nothing. `temperature` of both predictions."""

    strength: float = 1.0
    temperature: float = 1.0

    def faults(self) -> list[str]:
        """A push, a temperature that is none."""
        faults = [] if self.strength >= 0 else [f"strength = {self.strength}: at least 0"]
        return faults + ([] if self.temperature > 0 else [f"temperature = {self.temperature}: above 0"])


class Method(Seams):
    """Makes the teacher before the first batch of a stage, and after a resume."""

    num_copies = 1  # the teacher's pieces

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._start: list[Tensor] | None = None  # one for each of the masters' pieces
        self._teacher: nn.Module | None = None
        self._divergence: Tensor | None = None
        self._num_micro_batches = 0
        self._hidden: Tensor | None = None  # the teacher's, of the part before this one

    @property
    def num_whole_copies(self) -> int:
        """The teacher that computes."""
        return 1 if self.settings.strength else 0

    def meet(self, model: nn.Module, make_model: Callable[[], nn.Module], masters: Masters, mesh: Mesh) -> None:
        """Know the model, which is asked what it is given, and how another is made."""
        self._model, self._make_model, self._masters, self._mesh = model, make_model, masters, mesh
        model.register_forward_pre_hook(self._remember_inputs, with_kwargs=True)
        if not mesh.is_last_part:
            model.register_forward_hook(self._send_along)

    def before_batch(self, progress: Progress) -> None:
        """Without a teacher, make one of the stage's start."""
        self._divergence, self._num_micro_batches = None, 0
        if self._teacher is not None or not self.settings.strength:
            return
        if self._start is None:
            self._start = [piece.values.detach().clone() for piece in self._masters.pieces]
        teacher = self._make_model()
        for parameter in teacher.parameters():  # not its buffers, nor on the device, which may have no room for fp32
            parameter.data = parameter.data.to(self._masters.computing_type)
        self._teacher = teacher.to(self._mesh.device)
        for name, values in self._masters.gathered(self._start):
            weight = self._teacher.get_parameter(name)
            weight.data = values.to(self._masters.computing_type)
        self._teacher.eval().requires_grad_(False)
        if self._mesh.is_last_part:
            self._teacher.head.beside = lambda hidden, weight: (hidden, weight)
            self._model.head.beside = self._compare

    def after_forward(self, forward: Forward) -> Tensor | None:
        """The further loss of this micro-batch."""
        if forward.beside is None:
            return None
        mean = forward.mean(forward.beside)
        total = mean.detach() if self._divergence is None else self._divergence + mean.detach()
        self._divergence, self._num_micro_batches = total, self._num_micro_batches + 1
        return self.settings.strength * self.settings.temperature**2 * mean

    def end_stage(self, masters: Masters, progress: Progress) -> bool:
        """The next stage has a teacher of its own."""
        self._dismiss_teacher()
        return False

    def report(self) -> dict[str, float]:
        """KL(teacher || model) in nats a token, the mean over the step; every rank must call it."""
        if self._teacher is None:
            return {}
        mesh = self._mesh
        here = torch.zeros((), dtype=torch.float64, device=mesh.device)  # parts without the head compare nothing
        if self._divergence is not None:
            here = self._divergence.double() / self._num_micro_batches
        return {"method/distillation/divergence": float(mesh.sum(here)) * mesh.pipeline.size / mesh.size}

    def state_dict(self) -> dict[str, Any]:
        """The teacher by piece."""
        return {} if self._start is None else {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the teacher; the copy that computes is made before the next batch."""
        self._dismiss_teacher()
        self._start = state.get("start")

    def _dismiss_teacher(self) -> None:
        self._start = self._teacher = None
        if self._mesh.is_last_part:
            self._model.head.beside = None

    def _remember_inputs(self, model: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple | None:
        """What the teacher is to be given as well; of what the part before sent, the model gets its own."""
        tokens, _, *documents = inputs
        self._inputs, self._hidden = (tokens, None, *documents), None
        if not isinstance(named.get("hidden"), tuple):
            return None
        hidden, raw = named["hidden"]
        self._hidden = raw.view(hidden.dtype)
        return inputs, {**named, "hidden": hidden}

    @torch.no_grad()
    def _taught(self) -> Any:
        """What the teacher makes of the same inputs: hidden states, on the last part those and the head's weight."""
        return self._teacher(*self._inputs, hidden=self._hidden)

    def _send_along(self, model: nn.Module, inputs: tuple, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """For the next part, in training: the teacher's hidden states beside the model's."""
        if self._teacher is None or not model.training:
            return None
        # As bytes: DeepSpeed sends gradients back of all that is floating-point.
        return hidden, self._taught().view(torch.uint8)

    def _compare(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Beside the head: the divergence of each token from what the teacher predicts of the same inputs."""
        teacher_hidden, teacher_weight = self._taught()
        group = self._mesh.tensor
        return divergence(hidden, weight, teacher_hidden, teacher_weight, self.settings.temperature, group)
