"""The fp32 values behind a model under DeepSpeed, by parameter name, as the pieces that this rank owns.

DeepSpeed keeps the values that the optimiser works on ("masters") flat and cut over the data ranks, in another place
for each ZeRO stage:

    stage 0 fp32        the parameters themselves, whole on every rank
    stage 1 bf16        BF16_Optimizer.fp32_groups_flat_partition            one flat tensor a group
    stage 1, 2          DeepSpeedZeroOptimizer.single_partition_of_fp32_groups            "
    stage 3             DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat        one flat tensor a sub-group

Here all of them look alike: a list of `Piece`. Writing into a piece changes what the next step starts from;
`refresh` then derives the low-precision weights again. Writing into the model's own weights would be lost at the next
step: that is how the published Reptile code loses its outer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of one parameter, flattened; the tensors are views into DeepSpeed's memory.

    `is_copy`: other data ranks hold the same elements (ZeRO stage 0), and the first of them speaks for all.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: torch.Tensor  # [stop - start] fp32
    moments: dict[str, torch.Tensor]  # each [stop - start] fp32
    is_copy: bool


class Masters:
    """This rank's pieces of the fp32 masters and of the optimiser's moments.

    `engine` is the DeepSpeed engine around `module`; its inner optimiser is torch's AdamW. Makes the optimiser's state
    at once (zero moments, zero steps), so that it can be read and filled before the first step.
    """

    def __init__(self, engine: object, module: nn.Module, zero_stage: int) -> None:
        self._engine = engine
        self._stage = zero_stage
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._outer = engine.optimizer
        self._inner = self._outer if zero_stage == 0 else self._outer.optimizer
        self._flats = self._flat_tensors()
        for flat in self._flats:
            self._inner.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat.data) for moment in MOMENTS},
            }
        self.pieces: list[Piece] = list(self._find_pieces())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every parameter, also of those that lie on other ranks; the same on all."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    @property
    def num_updates(self) -> int:
        """How many updates the optimiser has made; what bias correction counts from."""
        return int(self._inner.state[self._flats[0]]["step"].item()) if self._flats else 0

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        """Let bias correction count from `number` updates."""
        for flat in self._flats:
            self._inner.state[flat]["step"].fill_(float(number))

    @torch.no_grad()
    def fill(self, read: Callable[[str, int, int], torch.Tensor], moment: str | None = None) -> None:
        """Fill the masters, or one moment, with `read(name, start, stop)`: the elements [stop - start] of a parameter.

        Call `refresh` after the masters were filled.
        """
        for piece in self.pieces:
            into = piece.values if moment is None else piece.moments[moment]
            into.copy_(read(piece.name, piece.start, piece.stop))

    @torch.no_grad()
    def refresh(self) -> None:
        """Derive the weights that the model computes with from the masters; every rank must call it."""
        if self._stage in (1, 2):
            self._outer.update_lp_params()
        elif self._stage == 3:
            for index in range(len(self._flats)):
                self._outer._reassign_or_swap_out_partitioned_parameters(index)
            # Small parameters stay gathered between steps; without this they would keep their old values.
            persistent = self._outer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
            # With zero_hpz_partition_size each node has a second copy, which would keep its old values too.
            self._outer.invalidate_secondary_tensor()

    def differing(self, read: Callable[[str, int, int], torch.Tensor]) -> list[str]:
        """Parameters here whose masters are not `read(name, start, stop)`, bit for bit."""
        return [
            piece.name
            for piece in self.pieces
            if not torch.equal(piece.values, read(piece.name, piece.start, piece.stop).to(piece.values))
        ]

    def stale(self) -> list[str]:
        """Parameters here whose weights in the model are not their masters, rounded: none, after `refresh`."""
        found = []
        for piece in self.pieces:
            parameter = self._parameters[piece.name]
            if self._stage == 3:
                weights = parameter.ds_tensor.data[: len(piece.values)]
            else:
                weights = parameter.data.reshape(-1)[piece.start : piece.stop]
            if not torch.allclose(weights, piece.values.to(weights), rtol=0.0, atol=0.0, equal_nan=True):
                found.append(piece.name)
        return found

    def total(self, number: float) -> float:
        """The sum over all data ranks of a number that each computed from its own pieces; every rank must call it."""
        if self._stage == 0 or not torch.distributed.is_initialized():
            return number
        box = torch.tensor(number, dtype=torch.float64, device=self._flats[0].device)
        torch.distributed.all_reduce(box)
        return float(box)

    def _flat_tensors(self) -> list[torch.Tensor]:
        if self._stage == 0:
            return list(self._parameters.values())
        if self._stage == 3:
            return list(self._outer.fp32_partitioned_groups_flat)
        groups = getattr(self._outer, "fp32_groups_flat_partition", None)
        return list(groups if groups is not None else self._outer.single_partition_of_fp32_groups)

    def _find_pieces(self) -> Iterator[Piece]:
        find = {0: self._whole, 1: self._from_flat_group, 2: self._from_flat_group, 3: self._from_sub_group}[
            self._stage
        ]
        for name, parameter in self._parameters.items():
            yield from find(name, parameter)

    def _whole(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        yield self._piece(name, tuple(parameter.shape), 0, parameter, 0, parameter.numel(), is_copy=True)

    def _from_flat_group(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        place = parameter._hp_mapping
        if place is not None:  # None: nothing of this parameter is in this rank's partition
            flat = self._flats[place.param_group_index]
            inside = place.hp_fragment_address
            start = place.lp_fragment_address.start
            yield self._piece(name, tuple(parameter.shape), start, flat, inside.start, inside.numel)

    def _from_sub_group(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        index, offset, num_here = self._outer.grad_position[self._outer.get_param_id(parameter)]
        rank = torch.distributed.get_rank(self._outer.dp_process_group)
        start = rank * num_here
        num_real = min(num_here, math.prod(parameter.ds_shape) - start)  # the last rank's end is padding
        if num_real > 0:
            yield self._piece(name, tuple(parameter.ds_shape), start, self._flats[index], offset, num_real)

    def _piece(
        self,
        name: str,
        shape: tuple[int, ...],
        start: int,
        flat: torch.Tensor,
        offset: int,
        number: int,
        is_copy: bool = False,
    ) -> Piece:
        def view(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.data.reshape(-1).narrow(0, offset, number)

        moments = {moment: view(self._inner.state[flat][moment]) for moment in MOMENTS}
        return Piece(name, shape, start, start + number, view(flat), moments, is_copy)
