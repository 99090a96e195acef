"""Cross-entropy through Triton's kernels, and z-loss in every twin, in the interpreter or on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cpt_harness.twins import CPU, DEVICES, assert_same_with_gradients, close, random, runnable
from torch import Tensor

from cpt_kernels import cross_entropy, logits
from cpt_kernels.cross_entropy import IGNORED
from cpt_kernels.language import why_not

# Tokens, width, vocabulary and tokens at once. In the interpreter: one word; less than a program has at once; more,
# and odd. On a GPU: slices of Llama-1B and of Pythia-410M, and an odd vocabulary.
SMALL = [(3, 4, 1, 2), (13, 24, 131, 5), (5, 6, 4099, 2)]
REAL = [(4096, 2048, 128256, None), (8192, 1024, 50304, None), (1001, 768, 50257, 300)]
PLACES = [
    pytest.param(device.values[0], sizes, id=f"{device.id}-{'x'.join(map(str, sizes))}", marks=device.marks)
    for device in DEVICES
    for sizes in (REAL if device.id == "gpu" else SMALL)
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = {"all alike": lambda losses: losses.new_full((), 0.37), "each its own": lambda losses: losses.cos() + 2}


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated is filled with NaN: an entry that no kernel has written is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case(num_tokens: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """Hidden states, a weight whose logits grow along the vocabulary, and targets of which every fifth is ignored."""
    hidden, weight = random(num_tokens, width, seed=1), random(vocabulary, width, seed=2) * 0.5
    weight *= torch.linspace(0.1, 2.0, vocabulary)[:, None]
    targets = torch.randint(vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(3))
    targets[::5] = IGNORED
    return [hidden, weight], targets


def losses_by_hand(targets: Tensor, z_loss: float):
    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        scores = hidden @ weight.T
        logsumexps = scores.logsumexp(-1)
        found = logsumexps - scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0] + z_loss * logsumexps**2
        return found.masked_fill(targets == IGNORED, 0.0)

    return losses


@pytest.mark.parametrize("weighed", WEIGHTS)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "sizes"), PLACES)
def test_losses_and_gradients_are_those_of_the_definition_however_losses_are_weighed(
    device, sizes, dtype, z_loss, weighed
):
    *shape, at_once = sizes
    inputs, targets = case(*shape)
    targets = targets.to(device)

    def summed(function):
        def total(*inputs: Tensor) -> Tensor:
            losses = function(*inputs)
            return torch.cat((losses.detach(), (losses * WEIGHTS[weighed](losses.detach())).sum()[None]))

        return total

    assert_same_with_gradients(
        summed(lambda h, w: cross_entropy.triton(h, w, targets, z_loss, at_once)),
        summed(losses_by_hand(targets, z_loss)),
        inputs,
        dtype,
        device,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("serving", [*runnable(cross_entropy), partial(cross_entropy.chunked, tokens_at_once=3)])
def test_every_twin_adds_the_squared_log_sum_exp_when_asked(serving, dtype):
    inputs, targets = case(14, 24, 131)
    inputs, targets = [inputs[0].view(2, 7, 24), inputs[1]], targets.view(2, 7)
    assert_same_with_gradients(
        lambda h, w: serving(h, w, targets, z_loss=0.1), losses_by_hand(targets, 0.1), inputs, dtype
    )


@pytest.fixture
def num_logits(monkeypatch):
    """How many tokens' logits were made, call by call."""
    made = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(logits.functional, "linear", lambda h, w: (made.append(len(h)), linear(h, w))[1])
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("weigh", "times"),
    [
        (lambda losses: losses.mean(), 1),
        (lambda losses: losses.sum() / 3 * 1024, 1),
        (lambda losses: (losses * torch.linspace(1, 2, 13, device=losses.device)).sum(), 2),
    ],
    ids=["mean", "scaled sum", "each its own"],
)
def test_logits_are_made_once_where_all_losses_weigh_the_same(device, weigh, times, num_logits):
    (hidden, weight), targets = case(13, 8, 11)
    hidden, weight = (x.float().to(device).requires_grad_() for x in (hidden, weight))
    weigh(cross_entropy.triton(hidden, weight, targets.to(device), tokens_at_once=5)).backward()
    assert num_logits == [5, 5, 3] * times


@pytest.mark.parametrize("device", DEVICES)
def test_scoring_makes_no_gradients(device, monkeypatch):
    monkeypatch.setattr(torch, "mm", None)
    (hidden, weight), targets = case(13, 8, 11)
    hidden, weight = (x.float().to(device).requires_grad_() for x in (hidden, weight))
    with torch.no_grad():
        losses = cross_entropy.triton(hidden, weight, targets.to(device))
    close(losses, losses_by_hand(targets.to(device), 0.0)(hidden.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("weighed", WEIGHTS)
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(device, frozen, weighed):
    (hidden, weight), targets = case(13, 8, 11)
    grads = []
    for function in (cross_entropy.triton, cross_entropy.plain):
        inputs = [x.float().to(device).requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        losses = function(*inputs, targets.to(device))
        (losses * WEIGHTS[weighed](losses.detach())).sum().backward()
        assert inputs[frozen].grad is None
        grads.append(inputs[1 - frozen].grad)
    close(grads[0], grads[1].double(), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_may_be_parts_of_others_and_in_any_order(device):
    inputs, targets = case(14, 8, 11)
    targets = targets.to(device).view(7, 2).T

    def turned(function):
        return lambda h, w: function(h.view(7, 2, 8).transpose(0, 1), w.T.contiguous().T)

    serving, definition = partial(cross_entropy.triton, targets=targets), losses_by_hand(targets, 0.0)
    assert_same_with_gradients(turned(lambda h, w: serving(h, w)), turned(definition), inputs, torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_pass_can_be_made_again_and_has_the_same_bits(device):
    (hidden, weight), targets = case(13, 8, 4099)
    results = []
    for _ in range(2):
        inputs = [x.half().to(device).requires_grad_() for x in (hidden, weight)]
        losses = cross_entropy.triton(*inputs, targets.to(device), tokens_at_once=5)
        for _ in range(2):
            results.append([losses.detach(), *torch.autograd.grad(losses.mean(), inputs, retain_graph=True)])
    for result in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(result, results[0], strict=True))


@pytest.mark.parametrize("scale", [1 / 13, 1e5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_losses_that_weigh_the_same_are_rounded_once(device, dtype, scale):
    """Not what they weigh before: 1 / 13 in bf16 is off by 2^-10, and 1e5 is more than fp16 has."""
    inputs, targets = case(13, 24, 131)
    inputs = [x.to(dtype).to(device).requires_grad_() for x in inputs]
    losses = cross_entropy.triton(*inputs, targets.to(device), tokens_at_once=5)
    of_hidden = torch.autograd.grad(losses.sum(), inputs[0], retain_graph=True)[0]
    scaled = torch.autograd.grad((losses * scale).sum(), inputs[0])[0]
    expected = (of_hidden.float() * torch.tensor(scale, device=device)).to(dtype)
    assert torch.equal(scaled, expected) and expected.isfinite().any() and expected.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_tokens_without_any_target_have_loss_and_gradient_0(device, num_tokens):
    inputs = [x.to(device).requires_grad_() for x in (torch.ones(num_tokens, 4), torch.ones(5, 4))]
    losses = cross_entropy.triton(*inputs, torch.full((num_tokens,), IGNORED, device=device))
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros_like(losses))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_is_not_a_number_stays_none(device):
    (hidden, weight), targets = case(6, 4, 5)
    inputs = [x.float().to(device).requires_grad_() for x in (hidden, weight)]
    (cross_entropy.triton(*inputs, targets.to(device)).sum() * torch.nan).backward()
    assert inputs[1].grad.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_slice_of_the_vocabulary_gives_its_part_of_both_statistics_and_of_the_gradient(device):
    scores = (random(6, 300, seed=5, dtype=torch.float32) * 9).to(device)
    targets = torch.tensor([0, 99, 100, 299, 150, 3], device=device)
    upstream = torch.linspace(-1, 2, 6, device=device)
    logsumexps, parts = scores.logsumexp(-1), []
    for first, last in ((0, 100), (100, 230), (230, 300)):
        here = scores[:, first:last].contiguous()
        places = torch.where((targets >= first) & (targets < last), targets - first, -1)
        for by in (logits.PLAIN, logits.TRITON):
            found = by.statistics(here, places)
            close(found[0], here.double().logsumexp(-1), torch.float32)
            close(found[1], torch.where(places >= 0, scores.double().gather(1, targets[:, None])[:, 0], 0.0),
                  torch.float32)  # fmt: skip
        parts.append(logits.TRITON.gradient(here, places, logsumexps, upstream, 0.1))
    wide = scores.double().requires_grad_()
    losses = wide.logsumexp(-1) - wide.gather(1, targets[:, None])[:, 0] + 0.1 * wide.logsumexp(-1) ** 2
    losses.backward(upstream.double())
    close(torch.cat(parts, dim=1), wide.grad, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_that_rise_or_fall_along_the_vocabulary_have_their_log_sum_exp(device):
    rising = torch.linspace(-50, 50, 9001, device=device)
    scores = torch.stack((rising, rising.flip(0), 1000 * rising, torch.zeros_like(rising)))
    places = torch.tensor([0, 4500, 9000, -1], device=device)
    logsumexps, chosen = logits.TRITON.statistics(scores, places)
    for mine, theirs in zip(logsumexps, scores.double().logsumexp(-1), strict=True):
        close(mine, theirs, torch.float32)
    assert torch.equal(chosen, torch.stack((scores[0, 0], scores[1, 4500], scores[2, 9000], chosen.new_zeros(()))))


def test_an_empty_slice_has_no_statistics_and_no_gradients():
    hidden, weight, places = torch.ones(4, 3), torch.ones(0, 3), torch.full((4,), -1)
    for by in (logits.PLAIN, logits.TRITON):
        logsumexps, chosen = logits.statistics_of(by, hidden, weight, places, 2)
        assert torch.equal(logsumexps, torch.full((4,), -torch.inf)) and torch.equal(chosen, torch.zeros(4))
        grads = logits.gradients_of(by, hidden, weight, places, torch.ones(4), torch.ones(4), 0.0, 2)
        assert torch.equal(grads[0], torch.zeros(4, 3)) and grads[1].shape == (0, 3)


def test_tensor_ranks_use_the_kernels_that_were_asked_for():
    assert cross_entropy.of_a_slice(cross_entropy.triton) is logits.TRITON
    assert all(cross_entropy.of_a_slice(f) is logits.PLAIN for f in (cross_entropy.plain, cross_entropy.by_size))


@pytest.mark.skipif(bool(why_not(CPU)), reason=str(why_not(CPU)))
@pytest.mark.parametrize("target", [131, -1])
def test_a_target_outside_the_vocabulary_is_told(target):
    with pytest.raises(RuntimeError, match="a target is out of bounds of 131 words"):
        cross_entropy.triton(torch.ones(2, 4), torch.ones(131, 4), torch.tensor([0, target]))
