"""Triton's rotary embedding against its plain definition in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import DEVICES, assert_same_with_gradients, random
from torch import Tensor

from cpt_kernels import rotary

CPU = torch.device("cpu")
# Windows, positions, query heads, key heads, entries of a head, entries that are turned.
SMALL = {
    "one token": (1, 1, 1, 1, 2, 2),
    "odd": (2, 7, 3, 1, 10, 10),
    "a part of a head": (2, 5, 4, 2, 20, 6),
    "many tokens at once": (3, 41, 2, 2, 16, 4),
}
REAL = {
    "Pythia-410M": (4, 2048, 16, 16, 64, 16),
    "Pythia-2.8B": (2, 2047, 32, 32, 80, 20),
    "Llama-8B": (1, 8192, 32, 8, 128, 128),
}
PLACES = [
    pytest.param(device.values[0], *shape, id=f"{device.id}-{name}", marks=device.marks)
    for device in DEVICES
    for name, shape in (REAL if device.id == "gpu" else SMALL).items()
]
every_place = pytest.mark.parametrize(("device", "windows", "positions", "heads", "groups", "width", "turned"), PLACES)
on_each = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated is filled with NaN: an entry that no kernel has written is then seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def angles_of(positions: int, turned: int, device: torch.device = CPU) -> Tensor:
    return rotary.table(positions, rotary.frequencies(turned, 500.0, device))


def together(serving, angles: Tensor):
    return lambda queries, keys: torch.cat(serving(queries, keys, angles), dim=2)


@every_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_and_keys_are_turned_and_gradients_turned_back(
    device, windows, positions, heads, groups, width, turned, dtype
):
    angles = angles_of(positions, turned, device)
    inputs = [random(windows, positions, number, width, seed=seed) for seed, number in enumerate((heads, groups))]
    assert_same_with_gradients(
        together(rotary.triton, angles), together(rotary.plain, angles.double()), inputs, dtype, device
    )


@every_place
def test_each_window_has_positions_of_its_own(device, windows, positions, heads, groups, width, turned):
    places = torch.randint(0, positions, (windows, positions), generator=torch.Generator().manual_seed(1))
    angles = angles_of(positions, turned, device)[:, places.to(device)]  # [2, B, S, K/2]
    inputs = [random(windows, positions, number, width, seed=seed) for seed, number in enumerate((heads, groups))]
    assert_same_with_gradients(
        together(rotary.triton, angles), together(rotary.plain, angles.double()), inputs, torch.float32, device
    )


@on_each
@pytest.mark.parametrize("laid", ["as one tensor", "heads first", "entries apart", "the first positions of a table"])
def test_inputs_wherever_they_lie(laid, device):
    angles = angles_of(9 if laid == "the first positions of a table" else 5, 6, device)[:, :5]

    def parts(fused: Tensor) -> tuple[Tensor, Tensor]:
        if laid == "heads first":  # [B, H + G, S, K]
            fused = fused.transpose(1, 2).contiguous().transpose(1, 2)
        if laid == "entries apart":
            fused = fused.mT.contiguous().mT
        return fused[:, :, :4], fused[:, :, 4:]

    assert_same_with_gradients(
        lambda x: together(rotary.triton, angles)(*parts(x)),
        lambda x: together(rotary.plain, angles.double())(*parts(x)),
        [random(2, 5, 6, 8, seed=1)],
        torch.float32,
        device,
    )


@on_each
def test_what_is_not_turned_keeps_its_bits_and_inputs_are_left_alone(device):
    queries, keys = (random(2, 5, 2, 20, seed=seed, dtype=torch.bfloat16).to(device) for seed in (1, 2))
    before = queries.clone(), keys.clone()
    turned = rotary.triton(queries, keys, angles_of(5, 6, device))
    for vectors, same, got in zip((queries, keys), before, turned, strict=True):
        assert torch.equal(vectors, same) and torch.equal(got[..., 6:], vectors[..., 6:])
        assert not torch.equal(got[:, 1:, :, :6], vectors[:, 1:, :, :6])


@every_place
def test_the_same_input_gives_the_same_bits(device, windows, positions, heads, groups, width, turned):
    angles, results = angles_of(positions, turned, device), []
    inputs = [random(windows, positions, number, width, seed=seed) for seed, number in enumerate((heads, groups))]
    for _ in range(2):
        vectors = [x.bfloat16().to(device).requires_grad_() for x in inputs]
        turns = rotary.triton(*vectors, angles)
        upstream = [random(*x.shape, seed=9, dtype=torch.bfloat16).to(device) for x in turns]
        results.append([*turns, *torch.autograd.grad(turns, vectors, upstream)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@on_each
def test_a_gradient_of_keys_alone(device):
    queries, keys = (random(1, 3, 2, 4, seed=seed, dtype=torch.float32).to(device).requires_grad_() for seed in (1, 2))
    rotary.triton(queries, keys, angles_of(3, 4, device))[1].sum().backward()
    expected = torch.autograd.grad(rotary.plain(queries, keys, angles_of(3, 4, device))[1].sum(), keys)[0]
    torch.testing.assert_close(keys.grad, expected)
    assert not queries.grad.any()


@on_each
def test_float64_is_left_to_the_plain_twin(device):
    vectors, angles = random(1, 3, 2, 4, seed=1).to(device), angles_of(3, 4, device)
    pairs = zip(rotary.triton(vectors, vectors, angles), rotary.plain(vectors, vectors, angles), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@on_each
def test_to_torch_it_is_an_operation_with_a_gradient_that_it_can_trace(device):
    vectors = [random(1, 3, 2, 4, seed=seed, dtype=torch.float32).to(device).requires_grad_() for seed in (1, 2)]
    angles = angles_of(3, 4, device)
    torch.library.opcheck(
        rotary.turn, (*vectors, angles, 1.0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    serving = together(rotary.triton, angles)
    traced = torch.compile(serving, backend="aot_eager", fullgraph=True)
    once = torch.autograd.grad(serving(*vectors).square().sum(), vectors)
    again = torch.autograd.grad(traced(*vectors).square().sum(), vectors)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(once, again, strict=True))


@on_each
def test_the_check_passes_and_tells_what_is_wrong(device, monkeypatch):
    assert rotary.check(device) is None
    right = rotary.triton
    monkeypatch.setattr(rotary, "triton", lambda queries, keys, angles: right(queries, keys, -angles))
    assert rotary.check(device).startswith("output in float32 is off by")
