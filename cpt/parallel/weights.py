"""The fp32 values behind a model under DeepSpeed, by parameter name, as the pieces that this rank owns.

DeepSpeed keeps the values that the optimiser works on ("masters") flat and cut over the replicas, in another place
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cpt.parallel.mesh import Group, Mesh
from cpt.parallel.parts import Part, parts_of, whole

MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements start to stop of a whole parameter, flattened, by its name.
Read = Callable[[str, int, int], torch.Tensor]
# A parameter by its name, the first element of it that is meant, and what this rank holds from there on.
_Held = tuple[str, int, tuple[torch.Tensor, ...]]
# Of a fingerprint, which takes 16 bytes for each.
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of one parameter of the whole `shape`, flattened; the tensors are views into
    DeepSpeed's memory.

    `columns`: (first, last + 1) of those that this rank's tensor group gave it; elements are then counted in these
    columns alone, as if there were no others. None: the parameter has all its columns here.
    `is_counted`: false where another rank holds the same elements and is the one that writes them and adds them up.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: torch.Tensor  # [stop - start] fp32
    moments: dict[str, torch.Tensor]  # each [stop - start] fp32
    is_counted: bool = True
    columns: tuple[int, int] | None = None

    def take(self, read: Read) -> torch.Tensor:
        """This piece's elements [stop - start], of what `read` gives of the whole parameter."""
        if self.columns is None:
            return read(self.name, self.start, self.stop)
        width, (first, last) = self.shape[1], self.columns
        row, stop_row = self.start // (last - first), -(-self.stop // (last - first))
        rows = read(self.name, row * width, stop_row * width).view(-1, width)[:, first:last]
        before = row * (last - first)
        return rows.reshape(-1)[self.start - before : self.stop - before]


class Masters:
    """This rank's pieces of the fp32 masters and of the optimiser's moments.

    `engine` is the DeepSpeed engine around `module`; its inner optimiser is torch's AdamW. Makes the optimiser's state
    at once (zero moments, zero steps), so that it can be read and filled before the first step.
    """

    def __init__(self, engine: object, module: nn.Module, zero_stage: int, mesh: Mesh) -> None:
        self._engine = engine
        self._stage = zero_stage
        self._mesh = mesh
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._parts = _parts_here(module, self._parameters, mesh)
        self._shapes_elsewhere: dict[str, tuple[int, ...]] = getattr(module, "shapes_elsewhere", {})
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
        return {name: part.shape for name, part in self._parts.items()} | self._shapes_elsewhere

    @property
    def learning_rate(self) -> float:
        """That of the update that comes, or was just made."""
        return float(self._outer.param_groups[0]["lr"])

    @property
    def computing_type(self) -> torch.dtype:
        """The type of the weights that the model computes with."""
        return next(iter(self._parameters.values())).dtype

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
    def fill(self, read: Read, moment: str | None = None) -> None:
        """Fill the masters, or one moment, with `read(name, start, stop)`: the elements [stop - start] of a parameter.

        Call `refresh` after the masters were filled.
        """
        for piece in self.pieces:
            into = piece.values if moment is None else piece.moments[moment]
            into.copy_(piece.take(read))

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

    @torch.no_grad()
    def gathered(self, values: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each parameter as it lies on this rank when whole, from one tensor for each piece.

        In the shape of this rank's part, padding 0, fp32. Every rank must go through to the end; one parameter at a
        time is in memory.
        """
        replicas = self._mesh.same_parameters
        of_pieces: dict[str, list[tuple[Piece, torch.Tensor]]] = {}
        for piece, tensor in zip(self.pieces, values, strict=True):
            of_pieces.setdefault(piece.name, []).append((piece, tensor))
        for name, parameter in self._parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.zeros(shape, dtype=torch.float32, device=self._mesh.device)
            for piece, tensor in of_pieces.get(name, []):
                start = piece.start - self._parts[name].offset
                whole.view(-1)[start : start + len(tensor)] = tensor
            if self._stage and replicas.size > 1:
                torch.distributed.all_reduce(whole, group=replicas.handle)
            yield name, whole

    def differing(self, read: Read) -> list[str]:
        """Parameters here whose masters are not `read(name, start, stop)`, bit for bit."""
        return [piece.name for piece in self.pieces if not torch.equal(piece.values, piece.take(read).to(piece.values))]

    def stale(self) -> list[str]:
        """Parameters here whose weights in the model are not their masters, rounded: none, after `refresh`."""
        found = []
        for piece in self.pieces:
            parameter = self._parameters[piece.name]
            if self._stage == 3:
                weights = parameter.ds_tensor.data[: len(piece.values)]
            else:
                start = piece.start - self._parts[piece.name].offset
                weights = parameter.data.reshape(-1)[start : start + len(piece.values)]
            if not torch.allclose(weights, piece.values.to(weights), rtol=0.0, atol=0.0, equal_nan=True):
                found.append(piece.name)
        return found

    def differing_copies(self) -> list[str]:
        """Parameters that ranks hold alike and that are not the same to the bit; every rank must call it.

        Of tensor ranks masters and moments; of replicas, too, at ZeRO stage 0, and at 1 and 2 the weights that the
        model computes with. At 3 replicas hold nothing twice. Sends two numbers a parameter.
        """
        of_tensor = [piece for piece in self.pieces if piece.columns is None]  # columns begin at 0 on every rank
        differing = self._differing(_held(of_tensor), self._mesh.tensor)
        if self._stage == 0:
            differing |= self._differing(_held(self.pieces), self._mesh.same_parameters)
        elif self._stage < 3:
            weights = ((name, 0, (parameter.detach(),)) for name, parameter in self._parameters.items())
            differing |= self._differing(weights, self._mesh.same_parameters)
        return sorted(differing)

    def _differing(self, held: Iterable[_Held], group: Group) -> set[str]:
        """Names of what begins at the same element on another rank of the group and is not the same there."""
        if group.size == 1:
            return set()
        # A row for each parameter, because where there is only padding there is no piece.
        found = {name: (start, fingerprint(*tensors)) for name, start, tensors in held}
        numbers = [found.get(name, (-1, 0)) for name in self._parts]
        here = torch.tensor(numbers, dtype=torch.int64, device=self._mesh.device)  # [parameters, 2]
        of_ranks = [torch.empty_like(here) for _ in range(group.size)]
        torch.distributed.all_gather(of_ranks, here, group=group.handle)
        is_other = [(there[:, 0] == here[:, 0]) & (there[:, 1] != here[:, 1]) for there in of_ranks]
        names = list(self._parts)
        return {names[index] for index in torch.stack(is_other).any(dim=0).nonzero()[:, 0].tolist()}

    def total(self, numbers: Sequence[float]) -> float:
        """The sum over all elements of the model of `numbers`, one for each of this rank's pieces in their order.

        What several ranks hold is added once; every rank must call it.
        """
        counted = [number for piece, number in zip(self.pieces, numbers, strict=True) if piece.is_counted]
        box = torch.tensor(math.fsum(counted), dtype=torch.float64, device=self._mesh.device)
        return float(self._mesh.sum(box))

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
        yield from self._piece(name, parameter, 0, 0, parameter.numel())

    def _from_flat_group(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        place = parameter._hp_mapping
        if place is not None:  # None: nothing of this parameter is in this rank's partition
            flat = self._flats[place.param_group_index]
            inside = place.hp_fragment_address
            yield from self._piece(name, flat, inside.start, place.lp_fragment_address.start, inside.numel)

    def _from_sub_group(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        index, offset, num_here = self._outer.grad_position[self._outer.get_param_id(parameter)]
        rank = torch.distributed.get_rank(self._outer.dp_process_group)
        yield from self._piece(name, self._flats[index], offset, rank * num_here, num_here)

    def _piece(self, name: str, flat: torch.Tensor, offset: int, start: int, number: int) -> Iterator[Piece]:
        """The piece of `number` elements in `flat` from `offset` on, which are the parameter's here from `start` on.

        What is padding, of a part or at the end of the last replica, is set to 0 and left out.
        """
        part = self._parts[name]
        num_real = min(number, part.num_elements - start)
        flat.data.reshape(-1)[offset + max(0, num_real) : offset + number].zero_()
        if num_real <= 0:
            return

        def view(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.data.reshape(-1).narrow(0, offset, num_real)

        moments = {moment: view(self._inner.state[flat][moment]) for moment in MOMENTS}
        start += part.offset
        is_counted = part.is_first_copy
        if self._stage == 0:  # all replicas hold all; taking turns spreads the writing over their disks
            turn, group = list(self._parts).index(name), self._mesh.same_parameters
            is_counted = is_counted and turn % group.size == group.rank
        yield Piece(name, part.shape, start, start + num_real, view(flat), moments, is_counted, part.columns)


def fingerprint(*tensors: torch.Tensor) -> int:
    """A number of the bits of tensors of 16 or 32 bits that another bit, or another order, changes."""
    total, place = 0, 0
    for tensor in tensors:
        bits = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).flatten()
        for part in bits.split(_ELEMENTS_AT_ONCE):
            places = torch.arange(place + 1, place + len(part) + 1, device=part.device)
            total = total + (part.long() * (2 * places + 1)).sum()  # odd factors: the overflow loses no changed bit
            place += len(part)
    return int(total)


def _held(pieces: Sequence[Piece]) -> Iterator[_Held]:
    """What a rank keeps for each of these pieces."""
    return ((piece.name, piece.start, (piece.values, *piece.moments.values())) for piece in pieces)


def _parts_here(module: nn.Module, parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[str, Part]:
    """The part of every parameter that lies on this rank; what no layer has cut is whole."""
    cut = parts_of(module)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    return {name: cut.get(name) or whole(shape, mesh.tensor.rank == 0) for name, shape in shapes.items()}
