"""The loss of each window of a step is the mean over its targets, in the batch's order, whoever computed it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.config import build
from cpt.progress import Progress
from cpt_kernels import Settings, choose

# (ranks, axes, ZeRO stage, micro-batch), of 8 windows a step.
CASES = [
    (1, {}, 0, 2),
    (2, {}, 3, 1),
    (4, {}, 1, None),
    (4, {"tensor": 2}, 2, 2),
    (4, {"pipeline": 2}, 1, 2),
    (2, {"sequence": 2}, 1, 4),
    (4, {"pipeline": 2, "tensor": 2}, 0, 1),
]


def model():
    settings = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)
    return build(settings, "Model", choose(Settings(), torch.device("cpu")))


def starts_of_step() -> torch.Tensor:
    """Very uneven: in the first window no target counts, in the last all do."""
    chances = torch.tensor([1.0, 0.9, 0.5, 0.5, 0.3, 0.1, 0.0, 0.0])[:, None]
    return torch.rand(8, tiny.LENGTH + 1, generator=torch.Generator().manual_seed(5)) < chances


@pytest.mark.parametrize("is_within_documents", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_that_of_the_window_scored_by_itself(case, is_within_documents):
    ranks, axes, zero, micro_batch = case
    tokens, starts = tiny.windows_of_step(0), starts_of_step() if is_within_documents else None

    def work(mesh):
        engine = tiny.start_engine(
            mesh, zero=zero, micro_batch=micro_batch, model=model, is_within_documents=is_within_documents
        )
        here = 8 // mesh.data_size
        mine = slice(mesh.data_rank * here, (mesh.data_rank + 1) * here)
        told = []
        for step in range(2):  # of the last step, and of no other
            engine.step(
                tokens[mine], torch.zeros(here, dtype=torch.long), 1, 0.01 * (step == 0),
                Progress(step=step, stage_step=step), starts=None if starts is None else starts[mine],
            )  # fmt: skip
            told.append(engine.window_losses())
        return told, engine.score(tokens[mine], None if starts is None else starts[mine]), mesh.data_rank

    of_ranks = on_ranks(ranks, work, **axes)
    first, second = of_ranks[0][0]
    assert all(
        torch.equal(one, other) for told, *_ in of_ranks for one, other in zip(told, (first, second), strict=True)
    )
    counts = torch.full((8,), tiny.LENGTH) if starts is None else (~starts[:, 1:]).sum(dim=1)
    alone = torch.zeros(8, dtype=torch.float64)
    for _, sums, data_rank in of_ranks:
        alone[data_rank * len(sums) : (data_rank + 1) * len(sums)] = sums
    expected = alone / counts.clamp(min=1)  # the second update was of no size
    assert torch.allclose(second, expected, atol=2e-6, rtol=0), (second, expected)
    assert (first - second).abs().max() > 1e-3
    assert not is_within_documents or (counts[0] == 0 and second[0] == 0.0)


def test_one_that_is_not_finite_leaves_the_others_as_they_are():
    """As a pipeline's parts without the head, and other data ranks, add zeros to what one rank found."""

    def work(mesh):
        engine = tiny.start_engine(mesh, zero=1, micro_batch=2, model=model)
        engine._sums_of_windows = torch.full((4,), float(mesh.rank)).double()
        engine._counts_of_windows = torch.ones(4)
        if mesh.rank == 1:
            engine._sums_of_windows[2] = float("nan")
        return engine.window_losses()

    for losses in on_ranks(2, work):
        assert losses[:4].tolist() == [0.0] * 4 and losses[4:].tolist()[:2] == [1.0, 1.0]
        assert torch.isnan(losses).nonzero().tolist() == [[6]]
