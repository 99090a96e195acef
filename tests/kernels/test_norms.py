"""The Triton kernels of both normalisations, alone and with the residual sum, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import DEVICES, assert_same_with_gradients, random, runnable
from torch import Tensor

from cpt_kernels import layer_norm, rms_norm
from cpt_kernels.language import IS_INTERPRETED

# Rows and width. In the interpreter: one entry; less than a tile; more rows than all programs take in one round; wider
# than a tile. On a GPU: a step of Pythia-410M, of Llama-8B; odd; the widest.
SMALL = [(1, 1), (3, 37), (300, 33), (2, 2049)]
REAL = [(16384, 1024), (8192, 4096), (4097, 2049), (1000, 16384)]
PLACES = [
    pytest.param(device.values[0], shape, id=f"{device.id}-{shape[0]}x{shape[1]}", marks=device.marks)
    for device in DEVICES
    for shape in (REAL if device.id == "gpu" else SMALL)
]
NORMS = ["rms_norm", "layer_norm"]


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated is filled with NaN: an entry that no kernel has written is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def by_hand(name: str):
    def normal(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        if name == "rms_norm":
            return hidden / ((hidden**2).mean(-1, keepdim=True) + 0.1) ** 0.5 * weight
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + 0.1) ** 0.5 * weight + bias[0]

    return normal


def served(name: str, hidden: Tensor, *weights: Tensor, residual: Tensor | None = None):
    return (rms_norm if name == "rms_norm" else layer_norm).triton(hidden, *weights, 0.1, residual)


def weights_of(name: str, width: int) -> list[Tensor]:
    return [random(width, seed=3) + 1, random(width, seed=4)][: 1 if name == "rms_norm" else 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("device", "shape"), PLACES)
def test_a_norm_is_its_definition_in_both_directions(device, shape, name, dtype):
    inputs = [random(*shape, seed=1) + 1, *weights_of(name, shape[1])]
    assert_same_with_gradients(lambda *x: served(name, *x), by_hand(name), inputs, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("device", "shape"), PLACES)
def test_a_norm_of_a_sum_gives_both_and_takes_the_gradients_of_both(device, shape, name, dtype):
    def definition(hidden: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat((by_hand(name)(hidden + residual, *weights), hidden + residual))

    def serving(hidden: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat(served(name, hidden, *weights, residual=residual))

    inputs = [random(*shape, seed=1) + 1, random(*shape, seed=2), *weights_of(name, shape[1])]
    assert_same_with_gradients(serving, definition, inputs, dtype, device)


@pytest.mark.parametrize("operation", [rms_norm, layer_norm], ids=NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_twin_of_a_norm_of_a_sum_has_the_bits_of_the_sum_and_of_the_norm_alone(operation, dtype):
    weights = [w.to(dtype) for w in weights_of("rms_norm" if operation is rms_norm else "layer_norm", 37)]
    for serving in runnable(operation):
        if dtype is torch.bfloat16 and IS_INTERPRETED and serving is operation.triton:
            continue  # the interpreter cuts bf16 off where a sum would be rounded
        hidden, residual = random(5, 37, seed=1, dtype=dtype), random(5, 37, seed=2, dtype=dtype)
        normal, total = serving(hidden, *weights, 1e-5, residual)
        assert torch.equal(total, hidden + residual)
        assert torch.equal(normal, serving(total, *weights, 1e-5))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_takes_inputs_and_gradients_that_are_not_contiguous(device, name):
    weights = [w.repeat_interleave(2)[::2] for w in weights_of(name, 5)]

    def twice(function):
        # The gradient of a mean is one number, spread out.
        def both(hidden: Tensor, residual: Tensor, *weights: Tensor) -> Tensor:
            results = function(hidden.transpose(0, 2), residual.transpose(0, 2), *weights)
            return torch.stack([result.mean() for result in results])

        return both

    assert_same_with_gradients(
        twice(lambda x, r, *w: served(name, x, *w, residual=r)),
        twice(lambda x, r, *w: (by_hand(name)(x + r, *w), x + r)),
        [random(5, 3, 2, seed=1), random(5, 3, 2, seed=2), *weights],
        torch.float32,
        device,
    )


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_of_a_sum_of_which_one_result_is_used_has_that_one_s_gradient(device, name):
    weights = [w.float().to(device).requires_grad_() for w in weights_of(name, 9)]
    for used in (0, 1):
        hidden, residual = (random(4, 9, seed=s, dtype=torch.float32).to(device).requires_grad_() for s in (1, 2))
        served(name, hidden, *weights, residual=residual)[used].square().sum().backward()
        total = (hidden + residual).detach().requires_grad_()
        (by_hand(name)(total, *weights) if used == 0 else total).square().sum().backward()
        assert torch.allclose(hidden.grad, total.grad, atol=1e-5)
        assert torch.equal(hidden.grad, residual.grad)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_has_the_same_bits_when_it_is_computed_again(device, name):
    results = []
    for _ in range(2):
        inputs = [random(300, 33, seed=1), *weights_of(name, 33)]
        inputs = [x.to(torch.float16).to(device).requires_grad_() for x in inputs]
        normal = served(name, *inputs)
        normal.square().sum().backward()
        results.append([normal, *(x.grad for x in inputs)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_keeps_the_type_of_what_it_normalises_beside_weights_of_another(device):
    hidden = random(4, 37, seed=1, dtype=torch.float16).to(device).requires_grad_()
    weight = random(37, seed=2, dtype=torch.float32).to(device).requires_grad_()
    normal = rms_norm.triton(hidden, weight, 1e-5)
    normal.sum().backward()
    assert (normal.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float16, torch.float16, torch.float32)
    assert torch.allclose(normal.float(), rms_norm.plain(hidden, weight, 1e-5).float(), atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_of_no_rows_is_empty_and_its_weights_get_no_gradient(device, name):
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weights = [w.float().to(device).requires_grad_() for w in weights_of(name, 8)]
    normal = served(name, hidden, *weights)
    normal.sum().backward()
    assert normal.shape == (0, 8) and all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)


@pytest.mark.parametrize("operation", [rms_norm, layer_norm], ids=NORMS)
def test_float64_keeps_its_digits_in_every_twin(operation):
    hidden, weights = random(3, 7, seed=1), weights_of("rms_norm" if operation is rms_norm else "layer_norm", 7)
    for serving in runnable(operation):
        assert (serving(hidden, *weights, 1e-5) - operation.plain(hidden, *weights, 1e-5)).abs().max() < 1e-14
