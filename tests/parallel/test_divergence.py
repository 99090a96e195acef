"""The divergence from a teacher is torch's, with its gradients, whole and over ranks that share the vocabulary."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.ranks import on_ranks
from torch.nn import functional

from cpt.parallel.divergence import divergence
from cpt.parallel.tensor import copied
from cpt.parallel.vocabulary import rows_of


def inputs(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 5, 8), (vocabulary, 8), (2, 5, 8), (vocabulary, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain(hidden, weight, teacher_hidden, teacher_weight, temperature):
    student = functional.log_softmax(hidden @ weight.T / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_hidden @ teacher_weight.T / temperature, dim=-1)
    return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tokens_at_once", [None, 3])
def test_it_is_torchs_with_gradients(temperature, tokens_at_once):
    found, expected = ([x.requires_grad_(i < 2) for i, x in enumerate(inputs(11))] for _ in range(2))
    one, other = divergence(*found, temperature, tokens_at_once=tokens_at_once), plain(*expected, temperature)
    assert (one - other).abs().max() < 1e-13 and one.min() > 0
    factors = torch.rand(one.shape, dtype=one.dtype)
    (one * factors).sum().backward()
    (other * factors).sum().backward()
    for mine, reference in zip(found[:2], expected[:2], strict=True):
        assert (mine.grad - reference.grad).abs().max() < 1e-13


def test_it_is_worked_out_by_hand():
    # Teacher 1/2, 1/2; student 1/4, 3/4: ln(2) / 2 + ln(2/3) / 2 = ln(4/3) / 2
    one = torch.eye(1, dtype=torch.float64)
    student = torch.tensor([[1.0], [3.0]], dtype=torch.float64).log()
    found = divergence(one, student, one, torch.zeros_like(student))
    assert found.item() == pytest.approx(0.14384103622589042, abs=1e-15)
    assert divergence(one, student, one, student).item() == pytest.approx(0.0, abs=1e-16)


@pytest.mark.parametrize("vocabulary", [11, 2])
def test_over_ranks_that_share_the_vocabulary_it_is_the_same(vocabulary):
    """Of two rows, two of four ranks have none."""

    def work(mesh):
        hidden, weight, teacher_hidden, teacher_weight = inputs(vocabulary)
        first, last, _ = rows_of(vocabulary, mesh.tensor)
        hidden.requires_grad_()
        here = weight[first:last].clone().requires_grad_()
        found = divergence(
            copied(hidden, mesh.tensor), here, teacher_hidden, teacher_weight[first:last], 1.5, mesh.tensor, 4
        )
        found.square().sum().backward()
        return [
            found.detach(),
            hidden.grad,
            torch.zeros_like(weight).index_add(0, torch.arange(first, last), here.grad),
        ]

    expected = [x.requires_grad_(i < 2) for i, x in enumerate(inputs(vocabulary))]
    losses = plain(*expected, 1.5)
    losses.square().sum().backward()
    of_ranks = on_ranks(4, work, tensor=4)
    for found, grad_hidden, _ in of_ranks:
        assert torch.equal(found, of_ranks[0][0])
        assert (found - losses).abs().max() < 1e-12
        assert (grad_hidden - expected[0].grad).abs().max() < 1e-12
    assert (sum(grad for *_, grad in of_ranks) - expected[1].grad).abs().max() < 1e-12


def test_in_bf16_it_is_near():
    rounded = [x.bfloat16() for x in inputs(11)]
    found, exact = divergence(*rounded), plain(*(x.double() for x in rounded), 1.0)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.02 * exact.max()
