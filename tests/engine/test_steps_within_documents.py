"""A step on packed windows is that of plain torch on the separated documents, however unevenly ranks share targets."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.progress import Progress

NUM_STEPS = 4
# As in test_equality: gradients are summed in another order.
TOLERANCE = 2e-6
# (ZeRO stage, ranks, micro-batch), of 8 windows a step.
CASES = [(zero, 1, 2) for zero in (0, 1, 2, 3)] + [(zero, 2, None) for zero in (0, 3)]
CASES += [(1, 2, 1), (2, 2, 2), (0, 4, 1), (3, 4, 2)]


def starts_of_step(step: int) -> torch.Tensor:
    """Where documents begin in the 8 windows [8, LENGTH + 1]: very unevenly, so that means of means would be wrong.

    The first micro-batches are padding in which every token is a document; the last windows have no boundary at all.
    """
    chances = torch.tensor([1.0, 1.0, 1.0, 0.7, 0.3, 0.1, 0.0, 0.0]).roll(step)[:, None]
    generator = torch.Generator().manual_seed(50 + step)
    return torch.rand(8, tiny.LENGTH + 1, generator=generator) < chances


def losses_of_documents(model, tokens: torch.Tensor, starts: torch.Tensor) -> list[torch.Tensor]:
    """The losses of each document of a window, alone; the last token is only a target."""
    begins = [0, *[p for p in range(1, len(tokens)) if starts[p]], len(tokens)]
    documents = [tokens[first:stop] for first, stop in zip(begins, begins[1:], strict=False)]
    return [model(d[None, :-1], d[None, 1:])[0] for d in documents if len(d) > 1]


def reference() -> dict:
    """The same training in plain torch on one device, document by document."""
    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    told: dict = {"loss": [], "norm": [], "by_source": []}
    for step in range(NUM_STEPS):
        windows = zip(tiny.windows_of_step(step), starts_of_step(step), strict=True)
        losses = [torch.cat([torch.zeros(0), *losses_of_documents(model, *window)]) for window in windows]
        torch.cat(losses).mean().backward()
        told["norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = tiny.rate_of_step(step)
        optimizer.step()
        optimizer.zero_grad()
        told["loss"].append(torch.cat(losses).detach().double().mean().item())
        told["by_source"].append([torch.cat(losses[source::2]).detach().double().mean().item() for source in (0, 1)])
    return {**told, "masters": {name: p.detach() for name, p in model.named_parameters()}}


def mine(mesh, whole: torch.Tensor) -> torch.Tensor:
    """This rank's windows of a step's."""
    here = len(whole) // mesh.size
    return whole[mesh.rank * here : (mesh.rank + 1) * here]


def take_steps(engine, mesh, starts_of=starts_of_step) -> list:
    sources = torch.arange(8) % 2
    return [
        engine.step(
            mine(mesh, tiny.windows_of_step(step)), mine(mesh, sources), 2, tiny.rate_of_step(step),
            Progress(step=step, stage_step=step), starts=None if starts_of is None else mine(mesh, starts_of(step)),
        )
        for step in range(NUM_STEPS)
    ]  # fmt: skip


def told_of(results: list) -> dict:
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "by_source": [[r.loss_by_source[0], r.loss_by_source[1]] for r in results],
    }


def train(mesh, zero: int, micro: int | None, starts_of=starts_of_step, precision: str = "fp32") -> dict:
    engine = tiny.start_engine(mesh, zero=zero, micro_batch=micro, precision=precision)
    return {**told_of(take_steps(engine, mesh, starts_of)), "fragments": tiny.fragments(engine)}


@pytest.fixture(scope="module")
def plain() -> dict:
    return reference()


@pytest.fixture(scope="module")
def trained() -> dict:
    """Every case's results on the first rank, and joined masters; the cases of one number of ranks together."""
    told = {}
    for ranks in (1, 2, 4):
        here = [case for case in CASES if case[1] == ranks]
        of_ranks = on_ranks(ranks, lambda mesh, here=here: [train(mesh, zero, micro) for zero, _, micro in here])
        for index, case in enumerate(here):
            of_case = [results[index] for results in of_ranks]
            assert all(one["loss"] == of_case[0]["loss"] for one in of_case)
            told[case] = {**of_case[0], "masters": tiny.join([one["fragments"] for one in of_case])}
    return told


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_masters_equal_those_of_plain_torch_on_the_separated_documents(trained, plain, case):
    found = trained[case]
    assert found["loss"] == pytest.approx(plain["loss"], abs=TOLERANCE)
    assert found["norm"] == pytest.approx(plain["norm"], abs=TOLERANCE)
    assert torch.tensor(found["by_source"]).sub(torch.tensor(plain["by_source"])).abs().max() < TOLERANCE
    for name, values in plain["masters"].items():
        assert (found["masters"][name] - values).abs().max() < TOLERANCE, name


def test_the_boundaries_matter(plain):
    across = on_ranks(1, lambda mesh: train(mesh, 1, None, starts_of=None))[0]
    assert abs(across["loss"][0] - plain["loss"][0]) > 1e-3
    counts = [(~starts_of_step(0)[rows, 1:]).sum().item() for rows in (slice(0, 2), slice(2, 4), slice(4, 8))]
    assert counts[0] == 0 and counts[2] > 8 * counts[1]


def test_starts_that_mark_nothing_change_no_bit():
    def work(mesh):
        nothing = lambda step: torch.zeros(8, tiny.LENGTH + 1, dtype=torch.bool)  # noqa: E731
        for zero, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32")):
            without, within = (train(mesh, zero, 2, starts_of, precision) for starts_of in (None, nothing))
            pieces = zip(without.pop("fragments"), within.pop("fragments"), strict=True)
            assert all(torch.equal(a[3], b[3]) for a, b in pieces)
            assert without == within

    on_ranks(2, work)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_target_that_counts_has_loss_0_and_no_gradient(precision):
    def work(mesh):
        told = []
        for zero in (0, 1, 2, 3) if precision == "fp32" else (1, 3):
            engine = tiny.start_engine(mesh, zero=zero, precision=precision, micro_batch=2, weight_decay=0.0)
            before = tiny.fragments(engine)
            tokens, sources = mine(mesh, tiny.windows_of_step(0)), mine(mesh, torch.arange(8) % 2)
            every = torch.ones_like(tokens, dtype=torch.bool)
            empty = engine.step(tokens, sources, 2, 1e-3, Progress(), starts=every)
            unchanged = all(torch.equal(a[3], b[3]) for a, b in zip(before, tiny.fragments(engine), strict=True))
            after = engine.step(tokens, sources, 2, 1e-3, Progress(step=1))
            told.append((empty.loss, empty.loss_by_source, empty.grad_norm, empty.skipped, unchanged, after.loss))
        return told

    for of_rank in on_ranks(2, work):
        for *empty, loss in of_rank:
            assert empty == [0.0, {}, 0.0, False, True]
            assert loss == pytest.approx(4.1, abs=0.5)


def test_a_source_without_a_target_that_counts_is_left_out():
    def work(mesh):
        engine = tiny.start_engine(mesh)
        starts = mine(mesh, (torch.arange(8) % 2 == 1)[:, None].expand(8, tiny.LENGTH + 1))
        result = engine.step(
            mine(mesh, tiny.windows_of_step(0)), mine(mesh, torch.arange(8) % 2), 2, 1e-3, Progress(), starts=starts
        )
        return result.loss, result.loss_by_source

    for loss, by_source in on_ranks(2, work):
        assert by_source == {0: loss} and loss > 1


def test_scores_are_sums_over_the_targets_that_count():
    def work(mesh):
        engines = [tiny.start_engine(mesh, zero=zero) for zero in (0, 3)]
        return [engine.score(tiny.windows_of_step(0), starts_of_step(0)) for engine in engines]

    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    windows = zip(tiny.windows_of_step(0), starts_of_step(0), strict=True)
    expected = [sum(losses.sum().item() for losses in losses_of_documents(model, *window)) for window in windows]
    for of_rank in on_ranks(2, work):
        for found in of_rank:
            assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, abs=1e-5)
            assert found[:3].tolist() == [0.0] * 3
