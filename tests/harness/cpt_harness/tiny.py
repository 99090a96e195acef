"""Models small enough for ten steps in a tenth of a second, with odd sizes, and engines around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cpt.config import beside
from cpt.engine import Engine, StepResult, loss_scale
from cpt.engine.settings import Batch, Optimizer, Settings
from cpt.methods import Seams
from cpt.models import llama
from cpt.models.layers import compiled, recompute
from cpt.models.layers.blocks import prepare_blocks
from cpt.models.layers.cutting import cut
from cpt.models.layers.parting import blocks_of_parts, keep_part
from cpt.models.layers.sharing import share_positions
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Piece
from cpt.progress import Progress
from cpt_kernels import adamw, switch

LLAMA = llama.Settings(
    vocabulary=61, width=24, layers=2, heads=3, kv_heads=1, mlp_width=40, longest_sequence=16, initial_std=0.2
)
LENGTH = 12
SEED = 5


def rate_of_step(step: int) -> float:
    """Another learning rate in every step of three, so that a step with its neighbour's rate is found out."""
    return 3e-3 * (1 + step % 3)


def build_llama() -> llama.Model:
    """The tiny Llama; its weights are not set."""
    return llama.Model(LLAMA, switch.choose(switch.Settings(), torch.device("cpu")))


def let_the_cpu_train_in_fp16() -> None:
    """In this process. Torch computes fp16 on any CPU, slowly; DeepSpeed asks for instructions that few have."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


class Crumbs(nn.Module):
    """Parameters smaller than a world of ranks (1, 2 and 3 elements) beside one of a prime size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(7, 3))
        self.one_norm = nn.Parameter(torch.empty(1))
        self.two_norm = nn.Parameter(torch.empty(2))
        self.three = nn.Parameter(torch.empty(3))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(tokens % 7, self.table) * self.three  # [B, S, 3]
        scores = rows.sum(dim=-1) * self.one_norm + self.two_norm.prod()
        return (scores - targets.to(scores.dtype) / 8).square().float()

    def initial_value(self, name: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + len(name))
        return torch.empty(self.shapes[name]).normal_(0.0, 1.0, generator=generator)

    def decays(self, name: str) -> bool:
        return not name.endswith("norm")


def start_engine(
    mesh: Mesh,
    *,
    zero: int = 1,
    precision: str = "fp32",
    windows: int = 8,
    micro_batch: int | None = None,
    methods: Sequence[Seams] = (),
    model: Callable[[], nn.Module] = build_llama,
    fill: bool = True,
    deepspeed: dict[str, Any] | None = None,
    recomputing: recompute.Settings | None = None,
    compiling: compiled.Settings | None = None,
    is_within_documents: bool = False,
    shares_norms: bool = False,
    scale: loss_scale.Settings | None = None,
    adamw: Callable[..., torch.optim.Optimizer] = adamw.fused,
    **optimizer: float,
) -> Engine:
    """An engine around a new model, or this rank's part of it, with the model's initial values of SEED."""

    def make() -> nn.Module:
        made = model()
        if mesh.tensor.size > 1:
            made = cut(made, beside(made.settings, "CUTS"), mesh.tensor, shares_norms)
        if mesh.sequence.size > 1:
            made = share_positions(made, mesh.sequence)
        if mesh.pipeline.size > 1:
            parts = blocks_of_parts(made.settings, LENGTH, mesh.pipeline.size)
            made = keep_part(made, parts[mesh.pipeline.rank], mesh.pipeline)
        return made

    made, settings = make(), Optimizer(**optimizer)
    if recomputing or compiling:
        recomputing, compiling = recomputing or recompute.Settings(), compiling or compiled.Settings()
        prepare_blocks(made, recomputing, compiling, zero == 3, is_within_documents)
    engine = Engine(
        made,
        Settings(
            precision, zero, Batch(windows, micro_batch), settings, deepspeed or {}, scale or loss_scale.Settings()
        ),
        mesh,
        list(methods),
        lambda groups: adamw(groups, 0.0, (settings.beta1, settings.beta2), settings.epsilon),
        decays=made.decays,
        make_model=make,
    )
    if fill:
        engine.fill(lambda name, start, stop: made.initial_value(name, SEED).reshape(-1)[start:stop])
    return engine


def windows_of_step(step: int, number: int = 8) -> torch.Tensor:
    """The tokens [number, LENGTH + 1] of all ranks in a step; hard enough that the loss keeps falling."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(0, LLAMA.vocabulary, (number, 1), generator=generator)
    stride = torch.randint(1, 4, (number, 1), generator=generator)
    return (first + stride * torch.arange(LENGTH + 1)) % LLAMA.vocabulary


def take_steps(
    engine: Engine,
    mesh: Mesh,
    first: int,
    last: int,
    number: int = 8,
    starts_of: Callable[[int], torch.Tensor] | None = None,
) -> list[StepResult]:
    """Steps `first` to before `last`, each rank on its share of the step's windows, which come of two sources.

    `starts_of(step)`: where documents begin in all of them, [number, LENGTH + 1].
    """
    results = []
    for step in range(first, last):
        here = number // mesh.data_size
        mine = slice(mesh.data_rank * here, (mesh.data_rank + 1) * here)
        sources = torch.arange(number)[mine] % 2
        starts = None if starts_of is None else starts_of(step)[mine]
        progress = Progress(step=step, stage_step=step)
        windows = windows_of_step(step, number)[mine]
        results.append(engine.step(windows, sources, 2, rate_of_step(step), progress, starts=starts))
    return results


Fragment = tuple[str, tuple[int, ...], int, torch.Tensor]  # name, whole shape, first element, values


def fragments(engine: Engine, moment: str | None = None) -> list[Fragment]:
    """This rank's pieces of the masters, or of a moment, copied out."""
    pieces = engine.masters.pieces
    return fragments_of(pieces, [p.values if moment is None else p.moments[moment] for p in pieces])


def fragments_of(pieces: Sequence[Piece], tensors: Sequence[torch.Tensor]) -> list[Fragment]:
    """One tensor for each piece, copied out; where a piece has some columns only, a fragment for each of its rows."""
    found = []
    for piece, tensor in zip(pieces, tensors, strict=True):
        if piece.columns is None:
            found.append((piece.name, piece.shape, piece.start, tensor.clone()))
            continue
        column, width = piece.columns[0], piece.columns[1] - piece.columns[0]
        places = torch.arange(piece.start, piece.stop)
        places = places // width * piece.shape[1] + column + places % width
        found.extend((piece.name, piece.shape, int(i), v[None].clone()) for i, v in zip(places, tensor, strict=True))
    return found


def join(of_ranks: Sequence[Sequence[Fragment]]) -> dict[str, torch.Tensor]:
    """Whole parameters from the fragments of all ranks. Fails unless every element is there, and equal where twice."""
    whole: dict[str, torch.Tensor] = {}
    for name, shape, start, values in (fragment for one in of_ranks for fragment in one):
        flat = whole.setdefault(name, torch.full(shape, float("nan")).reshape(-1))
        place = flat[start : start + len(values)]
        known = ~place.isnan()
        assert torch.equal(place[known], values[known]), f"{name}: ranks disagree"
        place.copy_(values)
        whole[name] = flat
    shapes = {name: shape for one in of_ranks for name, shape, _, _ in one}
    for name, flat in whole.items():
        assert not flat.isnan().any(), f"{name}: elements are missing"
    return {name: flat.reshape(shapes[name]) for name, flat in whole.items()}


def computed_with(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole weights that the model computes with, low precision where it is; every rank must call it."""
    import deepspeed

    weights = {}
    for name, parameter in engine._model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights
