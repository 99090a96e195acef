"""Cross-entropy, embedding and head over cut vocabularies are those of the whole one; nothing of its size is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cpt_harness.ranks import on_ranks
from cpt_harness.twins import CPU
from torch import nn
from torch.nn import functional

from cpt.parallel.tensor import copied
from cpt.parallel.vocabulary import VocabularyEmbedding, VocabularyHead, linear_cross_entropy, rows_of
from cpt_kernels import cross_entropy, logits
from cpt_kernels.cross_entropy import IGNORED
from cpt_kernels.language import why_not

WIDTH = 5
# (vocabulary, ranks): evenly, with padding on the last rank, with ranks that have nothing but padding.
CUTS = [(8, 2), (7, 2), (61, 4), (5, 4), (2, 4), (1, 2)]


def case(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [2, 9, D], weight [V, D], targets [2, 9] of which some are ignored, and gradients of the losses."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden, grads = torch.randn(2, 9, WIDTH, generator=generator), torch.randn(2, 9, generator=generator)
    weight = 3 * torch.randn(vocabulary, WIDTH, generator=generator)
    targets = torch.randint(vocabulary, (2, 9), generator=generator)
    targets[0, 3:5] = targets[1, -1] = IGNORED
    return hidden.to(dtype), weight.to(dtype), targets, grads.to(torch.promote_types(dtype, torch.float32))


def plain(vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, and gradients of the hidden states and of the weight, on one device."""
    hidden, weight, targets, grads = case(vocabulary, dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    losses = cross_entropy.plain(hidden, weight, targets)
    losses.backward(grads)
    return [losses.detach(), hidden.grad, weight.grad]


def on_one_rank(mesh, vocabulary: int, dtype: torch.dtype, tokens_at_once: int | None) -> list[torch.Tensor]:
    hidden, weight, targets, grads = case(vocabulary, dtype)
    first, last, _ = rows_of(vocabulary, mesh.tensor)
    here = weight[first:last].clone().requires_grad_()
    hidden.requires_grad_()
    losses = linear_cross_entropy(copied(hidden, mesh.tensor), here, targets, first, mesh.tensor, tokens_at_once)
    losses.backward(grads)
    return [losses.detach(), hidden.grad, here.grad]


@pytest.mark.parametrize(("vocabulary", "ranks"), CUTS)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(vocabulary, ranks):
    kinds = [(torch.float64, None, 1e-12), (torch.float64, 4, 1e-12), (torch.float32, 4, 2e-6)]

    def work(mesh):
        return [on_one_rank(mesh, vocabulary, dtype, at_once) for dtype, at_once, _ in kinds]

    for of_ranks, (dtype, _, tolerance) in zip(
        zip(*on_ranks(ranks, work, tensor=ranks), strict=True), kinds, strict=True
    ):
        losses, grad_hidden, grad_weight = plain(vocabulary, dtype)
        for one in of_ranks:
            assert torch.equal(one[0], of_ranks[0][0]) and torch.equal(one[1], of_ranks[0][1])
        found = [*of_ranks[0][:2], torch.cat([one[2] for one in of_ranks])]
        for tensor, expected in zip(found, (losses, grad_hidden, grad_weight), strict=True):
            assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
            assert (tensor - expected).abs().max() <= tolerance * expected.abs().max()
        assert (found[0][0, 3:5] == 0).all() and found[0][1, -1] == 0


@pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))
@pytest.mark.parametrize(("vocabulary", "ranks"), [(61, 2), (2, 4)])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary_through_triton_with_z_loss_too(vocabulary, ranks):
    hidden, weight, targets, grads = case(vocabulary, torch.float32)

    def work(mesh):
        first, last, _ = rows_of(vocabulary, mesh.tensor)
        inputs = [hidden.clone().requires_grad_(), weight[first:last].clone().requires_grad_()]
        copies = copied(inputs[0], mesh.tensor)
        losses = linear_cross_entropy(copies, inputs[1], targets, first, mesh.tensor, 4, 0.1, logits.TRITON)
        losses.backward(grads)
        return [losses.detach(), *(tensor.grad for tensor in inputs)]

    told = on_ranks(ranks, work, tensor=ranks)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = cross_entropy.plain(*whole, targets, z_loss=0.1)
    losses.backward(grads)
    found = [*told[0][:2], torch.cat([one[2] for one in told])]
    for tensor, expected in zip(found, (losses.detach(), *(tensor.grad for tensor in whole)), strict=True):
        assert (tensor - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_statistics_are_kept_in_fp32_where_the_weights_are_bf16():
    told = on_ranks(2, lambda mesh: on_one_rank(mesh, 61, torch.bfloat16, None), tensor=2)
    losses, grad_hidden, grad_weight = plain(61, torch.bfloat16)
    assert told[0][0].dtype == torch.float32
    assert (told[0][0] - losses).abs().max() < 1e-5
    for found, expected in ((told[0][1], grad_hidden), (torch.cat([one[2] for one in told]), grad_weight)):
        assert (found.float() - expected.float()).abs().max() < 0.01 * expected.abs().max()  # bf16 keeps 8 bits


def test_logits_that_are_huge_or_not_finite_are_told_as_on_one_device():
    def work(mesh):
        first, last, _ = rows_of(8, mesh.tensor)
        losses = []
        for factor in (1e30, float("nan")):
            hidden, weight, targets, _ = case(8, torch.float32)
            losses.append(linear_cross_entropy(hidden * factor, weight[first:last], targets, first, mesh.tensor))
        return losses

    hidden, weight, targets, _ = case(8, torch.float32)
    for huge, lost in on_ranks(2, work, tensor=2):
        expected = cross_entropy.plain(hidden * 1e30, weight, targets)
        assert torch.allclose(huge, expected, rtol=1e-5)
        assert lost[targets != IGNORED].isnan().all()


def test_no_logits_are_sent(monkeypatch):
    def work(mesh):
        sent, send = [], dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda box, *a, **k: (sent.append(box.numel()), send(box, *a, **k))[1])
        on_one_rank(mesh, 61, torch.float32, 4)
        return sent

    # The largest, both sums, and the gradient of the hidden states: for 18 tokens of width 5.
    assert on_ranks(2, work, tensor=2) == [[18, 36, 90]] * 2


@pytest.mark.parametrize(("vocabulary", "ranks"), [(7, 2), (5, 4)])
def test_embedding_and_logits_are_those_of_the_whole_and_padding_stays_0(vocabulary, ranks):
    tokens = torch.arange(2 * vocabulary).view(2, -1) % vocabulary

    def work(mesh):
        weight = case(vocabulary, torch.float64)[1]
        whole = nn.Embedding(vocabulary, WIDTH, dtype=torch.float64)
        embedding, head = VocabularyEmbedding(whole, mesh.tensor), VocabularyHead(weight, mesh.tensor)
        first, last, _ = rows_of(vocabulary, mesh.tensor)
        with torch.no_grad():
            embedding.weight[: last - first] = head.weight[: last - first] = weight[first:last]
        logits = head(embedding(tokens))
        logits.sin().sum().backward()  # the same on all ranks, as a loss is
        return [logits.detach(), *(layer.weight.grad for layer in (embedding, head)), last - first]

    weight = case(vocabulary, torch.float64)[1]
    rows, columns = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = functional.linear(functional.embedding(tokens, rows), columns)
    logits.sin().sum().backward()
    told = on_ranks(ranks, work, tensor=ranks)
    for one in told:
        assert torch.allclose(one[0], logits, atol=1e-12)
        assert not one[1][one[3] :].any() and not one[2][one[3] :].any()
    for number, expected in ((1, rows.grad), (2, columns.grad)):
        found = torch.cat([one[number][: one[3]] for one in told])
        assert torch.allclose(found, expected, atol=1e-12)
