"""The Triton kernels of SwiGLU and GELU, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import DEVICES, assert_same_with_gradients, random, runnable

from cpt_kernels import gelu, swiglu

# In the interpreter exp is numpy's.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
# One entry; less than a program has; several programs and a rest. On a GPU: Pythia-410M's and Llama-1B's widths.
SMALL = [(1,), (3, 7, 19), (3, 2049)]
REAL = [(16384, 4096), (4097, 8192), (333, 14337)]
PLACES = [
    pytest.param(device.values[0], shape, id=f"{device.id}-{'x'.join(map(str, shape))}", marks=device.marks)
    for device in DEVICES
    for shape in (REAL if device.id == "gpu" else SMALL)
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = {
    "swiglu": (swiglu.triton, lambda gate, up: gate / (1 + (-gate).exp()) * up),
    "gelu": (gelu.triton, lambda x: x * torch.special.ndtr(x)),
    "gelu by tanh": (
        lambda x: gelu.triton(x, is_tanh=True),
        lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    ),
}


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated is filled with NaN: an entry that no kernel has written is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(name: str, *shape: int) -> list[torch.Tensor]:
    return [3 * random(*shape, seed=seed) for seed in (1, 2)[: 2 if name == "swiglu" else 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("device", "shape"), PLACES)
def test_an_activation_is_its_definition_in_both_directions(device, shape, name, dtype):
    assert_same_with_gradients(*FUNCTIONS[name], inputs_of(name, *shape), dtype, device)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_activation_takes_inputs_and_gradients_that_are_not_contiguous(device, name):
    def turned(function):
        return lambda *x: function(*(tensor.transpose(0, 1) for tensor in x)).mean().view(1)

    serving, definition = FUNCTIONS[name]
    assert_same_with_gradients(turned(serving), turned(definition), inputs_of(name, 5, 7), torch.float32, device)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_activation_far_from_zero_is_a_number(device, name):
    far = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=device)
    inputs = [far.clone().requires_grad_() for _ in inputs_of(name, 1)]
    value = FUNCTIONS[name][0](*inputs)
    value.sum().backward()
    assert value.isfinite().all() and all(x.grad.isfinite().all() for x in inputs)
    assert value[0] == 0 and torch.equal(value[-2:], far[-2:] ** len(inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_activation_of_nothing_is_empty(device, name):
    inputs = [x.float().to(device).requires_grad_() for x in inputs_of(name, 0, 4)]
    FUNCTIONS[name][0](*inputs).sum().backward()
    assert all(x.grad.shape == (0, 4) for x in inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_activation_has_the_same_bits_when_it_is_computed_again(device, name):
    results = []
    for _ in range(2):
        inputs = [x.to(torch.float16).to(device).requires_grad_() for x in inputs_of(name, 3, 777)]
        value = FUNCTIONS[name][0](*inputs)
        value.square().sum().backward()
        results.append([value, *(x.grad for x in inputs)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("operation", [swiglu, gelu], ids=["swiglu", "gelu"])
def test_float64_keeps_its_digits_in_every_twin_of_an_activation(operation):
    inputs = inputs_of("swiglu" if operation is swiglu else "gelu", 3, 7)
    for serving in runnable(operation):
        assert (serving(*inputs) - operation.plain(*inputs)).abs().max() < 1e-14
