"""The whole matrix: every model on every mesh at every ZeRO stage is the model of one process.

`pytest -m long tests/engine/test_every_mesh.py` tells the table of docs/MESH.md in the end.
"""

from __future__ import annotations

import pytest
import torch
from cpt_harness.equality import alone, assert_near, case, joined, name_of_mesh, short, train_all

pytestmark = pytest.mark.long

MODELS = ("llama", "llama, tied, all biases", "pythia", "pythia, tied, sequential")
# Ranks and axes; data takes what remains. ZeRO 2 and 3 do not go with a pipeline.
MESHES = [
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {"sequence": 2}),
    (4, {"tensor": 2}),
    (4, {"pipeline": 2}),
    (4, {"sequence": 2}),
    (4, {"pipeline": 2, "tensor": 2}),
    (4, {"sequence": 2, "tensor": 2}),
    (4, {"pipeline": 2, "sequence": 2}),
    (4, {"tensor": 4}),
    (4, {"sequence": 4}),
    (3, {"pipeline": 3}),
    (8, {"pipeline": 2, "sequence": 2, "tensor": 2}),
]
# Tied models across documents only: the two have nothing to do with one another.
CASES = [(model, documents) for model in MODELS for documents in (False, True) if not (documents and "tied" in model)]


@pytest.fixture(scope="module")
def begun():
    """Those of CASES that were begun in this process: all of them, or what was selected, or a worker's share."""
    found: set[tuple[str, bool]] = set()
    return found


@pytest.fixture(scope="module")
def table():
    """For `(mesh, ranks)` and a family of models, the largest differences over all else."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    return found


def differences(found: dict, expected: dict) -> list[float]:
    """The largest of losses, of norms and of weights."""
    masters = [(found["masters"][name] - values).abs().max().item() for name, values in expected["masters"].items()]
    numbers = [torch.tensor(found[key]).sub(torch.tensor(expected[key])).abs().max().item() for key in ("loss", "norm")]
    return [*numbers, max(masters)]


@pytest.mark.parametrize(("model", "documents"), CASES)
def test_ten_steps_on_every_mesh_are_those_of_one_process(model, documents, begun, table):
    begun.add((model, documents))
    family = model.split(",")[0]
    ways = [
        (ranks, axes, shares) for ranks, axes in MESHES for shares in ((False, True) if "tensor" in axes else (False,))
    ]
    for ranks, axes, shares_norms in ways:
        cases = [case(model, ranks, zero, **axes) for zero in ((0, 1) if "pipeline" in axes else (0, 1, 2, 3))]
        for of_ranks in train_all(cases, 600.0, documents=documents, shares_norms=shares_norms).values():
            found, expected = joined(of_ranks), alone(model, documents)
            assert_near(found, expected)
            of_families = table.setdefault((name_of_mesh(ranks, axes), ranks), {})
            largest = of_families.get(family, [0.0, 0.0, 0.0])
            of_families[family] = [max(pair) for pair in zip(largest, differences(found, expected), strict=True)]
    losses = alone(model, documents)["loss"]
    assert losses[-1] < losses[0] - 0.3


def test_each_mesh_had_each_family(begun, table, tell):
    families = ("llama", "pythia")
    head = " | ".join(f"{family.capitalize()} losses | norms | weights" for family in families)
    lines = [f"| mesh | ranks | {head} |", f"|{'---|' * 8}"]
    for (mesh, ranks), of_families in table.items():
        cells = [of_families.get(family) for family in families]
        told = [cell for numbers in cells for cell in (map(short, numbers) if numbers else ["not run"] * 3)]
        lines.append(f"| {mesh} | {ranks} | {' | '.join(told)} |")
    tell("\n".join(lines))
    if begun != {*CASES}:
        pytest.skip(f"{len(begun)} of the {len(CASES)} other tests of this file ran here before")
    assert len(table) == len(MESHES) and all(of_families.keys() == {*families} for of_families in table.values())
