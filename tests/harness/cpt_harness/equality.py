"""Ten steps of a tiny model on any mesh, to be held against the same steps in one process."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from cpt.config import build
from cpt.models import pythia
from cpt.parallel.mesh import Mesh
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks
from cpt_kernels import Settings, choose

NUM_STEPS = 10
# Sums are made in another order: measured up to 5e-7 in losses of 3 to 4.5, in norms of 1 to 3, and 7e-7 in weights.
TOLERANCE = 2e-6
# Odd sizes throughout: a vocabulary that no number of ranks divides, a width that is no power of 2, three blocks.
_LLAMA = dataclasses.replace(tiny.LLAMA, layers=3, heads=4, kv_heads=2, width=24, head_width=6, mlp_width=20)
_PYTHIA = pythia.Settings(
    vocabulary=61, width=24, layers=3, heads=4, mlp_width=20, rotary_share=0.5, longest_sequence=16, initial_std=0.2
)
MODELS = {
    "llama": _LLAMA,
    "llama, tied, all biases": dataclasses.replace(_LLAMA, tied=True, attention_bias="all", mlp_bias=True),
    "llama, one head for all": dataclasses.replace(_LLAMA, kv_heads=1, attention_bias="qkv"),
    "pythia": _PYTHIA,
    "pythia, tied, sequential": dataclasses.replace(_PYTHIA, tied=True, has_parallel_residual=False),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of MODELS on so many ranks of a mesh, at a ZeRO stage; `axes` are pairs of name and size."""

    model: str
    ranks: int
    axes: tuple[tuple[str, int], ...]
    zero: int

    def __str__(self) -> str:
        cut = " x ".join(f"{axis} {size}" for axis, size in self.axes)
        return f"{self.model}: {self.ranks} ranks, {cut}, ZeRO {self.zero}"


def name_of_mesh(ranks: int, axes: dict[str, int]) -> str:
    """As tables have it: `tensor 2 x data 2`, `data`."""
    num_data = ranks // math.prod(axes.values())
    cut = [f"{axis} {size}" for axis, size in axes.items()]
    return " x ".join(cut + ([f"data {num_data}"] if cut and num_data > 1 else [])) or "data"


def short(number: float) -> str:
    """As tables have it: `2.4e-7`, `0`."""
    return f"{number:.1e}".replace("e-0", "e-") if number else "0"


def case(model: str, ranks: int, zero: int, **axes: int) -> Case:
    """As `Case`, with the axes by name."""
    return Case(model, ranks, tuple(axes.items()), zero)


def starts_of_step(step: int) -> torch.Tensor:
    """Documents of every length, in some windows none but the window."""
    chances = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0, 0.0]).roll(step)[:, None]
    return torch.rand(8, tiny.LENGTH + 1, generator=torch.Generator().manual_seed(70 + step)) < chances


def make(name: str) -> Callable[[], nn.Module]:
    """What makes the model of that name, whole and without weights."""
    return lambda: build(MODELS[name], "Model", choose(Settings(), torch.device("cpu")))


def train(
    mesh: Mesh, name: str, zero: int, precision: str = "fp32", documents: bool = False, **more: Any
) -> dict[str, Any]:
    """What the steps tell on this rank, token losses of the first windows after them, and this rank's masters."""
    # With AdamW's usual epsilon a gradient that is 0 but for rounding, such as of Pythia's key biases, moves weights.
    more = {"micro_batch": 2, "epsilon": 1e-4, **more}
    engine = tiny.start_engine(mesh, zero=zero, model=make(name), precision=precision, **more)
    starts_of = starts_of_step if documents else None
    results = tiny.take_steps(engine, mesh, 0, NUM_STEPS, starts_of=starts_of)
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "by_source": [[r.loss_by_source[0], r.loss_by_source[1]] for r in results],
        "scores": engine.token_losses(tiny.windows_of_step(0)[:3], starts_of_step(0)[:3] if documents else None)
        .flatten()
        .tolist(),
        "differing": engine.differing_copies(),
        "fragments": tiny.fragments(engine),
    }


def joined(of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of all ranks, which must say the same to the bit; `join` fails where copies differ."""
    first = of_ranks[0]
    for one in of_ranks:
        assert (one["loss"], one["norm"], one["scores"]) == (first["loss"], first["norm"], first["scores"])
        assert one["differing"] == []
    return {**first, "masters": tiny.join([one["fragments"] for one in of_ranks])}


def assert_near(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Losses, norms, scores and masters of two trainings are the same but for the order of sums."""
    assert found["loss"] == pytest.approx(expected["loss"], abs=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], abs=tolerance)
    # Of single targets, which no mean smooths.
    assert found["scores"] == pytest.approx(expected["scores"], abs=tolerance * tiny.LENGTH)
    assert torch.tensor(found["by_source"]).sub(torch.tensor(expected["by_source"])).abs().max() < tolerance
    assert found["masters"].keys() == expected["masters"].keys()
    for name, values in expected["masters"].items():
        assert (found["masters"][name] - values).abs().max() < tolerance, name


@functools.cache
def alone(name: str, documents: bool = False) -> dict[str, Any]:
    """A model's training in one process, at ZeRO 1: what plain torch does, as test_equality shows."""
    return joined(on_ranks(1, lambda mesh: train(mesh, name, 1, documents=documents)))


def train_all(cases: Sequence[Case], seconds: float = 180.0, **more: Any) -> dict[Case, list[dict[str, Any]]]:
    """The results of all ranks for every case, those of one mesh in the same processes, which have so many seconds."""
    told = {}
    for ranks, axes in dict.fromkeys((one.ranks, one.axes) for one in cases):
        here = [one for one in cases if (one.ranks, one.axes) == (ranks, axes)]
        work = lambda mesh, here=here: [train(mesh, one.model, one.zero, **more) for one in here]  # noqa: E731
        of_ranks = on_ranks(ranks, work, seconds, **dict(axes))
        told.update({one: [results[i] for results in of_ranks] for i, one in enumerate(here)})
    return told
