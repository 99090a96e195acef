"""AdamW's update as a Triton kernel with what is fused into it, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import DEVICES, random
from torch import Tensor

from cpt_kernels import adamw
from cpt_kernels.adamw_update import update

# Lengths of the tensors: one element, none, several programs and a rest. On a GPU a shard of 100M parameters too.
LENGTHS = {"interpreter": [1, 0, 2077], "gpu": [1, 0, 2077, 100_000_003]}
PLACES = [pytest.param(d.values[0], LENGTHS[d.id], id=d.id, marks=d.marks) for d in DEVICES]
NUMBERS = {"learning_rate": 0.01, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


def tensors(lengths: list[int], seed: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [random(length, seed=seed + i).to(dtype).to(device) for i, length in enumerate(lengths)]


def by_hand(master, gradient, mean, square, step):
    mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
    way = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    return master * (1 - 0.01 * 0.1) - 0.01 * way, mean, square


@pytest.mark.parametrize(
    ("gradient_type", "weight_type"),
    [(torch.float32, None), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("pulls", [False, True])
@pytest.mark.parametrize(("device", "lengths"), PLACES)
def test_three_updates_are_those_of_the_formula(device, lengths, pulls, gradient_type, weight_type):
    masters = tensors(lengths, 1, torch.float32, device)
    means, squares = [torch.zeros_like(m) for m in masters], [torch.zeros_like(m) for m in masters]
    anchors = [m.clone() for m in masters]
    weights = weight_type and [torch.full_like(m, torch.nan, dtype=weight_type) for m in masters]
    expected = [(m.double(), 0.0, 0.0) for m in masters]
    exact_anchors = [m.double() for m in masters]
    for step in (1, 2, 3):
        gradients = tensors(lengths, 10 * step, gradient_type, device)
        is_pulled = pulls and step > 1
        update(
            masters, gradients, means, squares, torch.tensor(float(step), device=device), **NUMBERS, loss_scale=8.0,
            clip=torch.tensor(0.75, device=device), weights=weights, anchors=anchors if is_pulled else None, kept=0.3,
        )  # fmt: skip
        for i, gradient in enumerate(gradients):
            expected[i] = by_hand(expected[i][0], gradient.double() / 8 * 0.75, *expected[i][1:], step)
            if is_pulled:
                exact_anchors[i] = exact_anchors[i] + 0.3 * (expected[i][0] - exact_anchors[i])
                expected[i] = (exact_anchors[i], *expected[i][1:])
    for i in range(len(lengths)):
        for mine, theirs in zip((masters[i], means[i], squares[i]), expected[i], strict=True):
            assert torch.allclose(mine.double(), theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(anchors[i], masters[i]) == (pulls or not lengths[i])
        if weights:  # the interpreter cuts bf16 off
            assert torch.allclose(weights[i].float(), masters[i], rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_torch_s_own_update_to_a_rounding(device):
    start, gradient = (random(999, seed=s, dtype=torch.float32).to(device) for s in (1, 2))
    results = []
    for make in (adamw.fused, adamw.triton):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make([{"params": [parameter], "weight_decay": 0.1}], 0.01, (0.9, 0.95), 1e-8)
        for _ in range(3):
            parameter.grad = gradient
            optimizer.step()
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"] and state["step"] == 3
        results.append([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() < 3e-7


@pytest.mark.parametrize("turns", ["parameter", "parameter and gradient", "gradient", "moments"])
@pytest.mark.parametrize("device", DEVICES)
def test_parameters_gradients_and_moments_may_lie_in_memory_in_another_order(device, turns):
    start, *gradients = (random(37, 53, seed=s, dtype=torch.float32).to(device) for s in (1, 2, 3, 4))
    if "gradient" in turns:
        gradients = [gradient.T.contiguous().T for gradient in gradients]
    results = []
    for make in (adamw.plain, adamw.triton):
        parameter = torch.nn.Parameter(start.T.contiguous().T if "parameter" in turns else start.clone())
        optimizer = make([{"params": [parameter], "weight_decay": 0.1}], 0.01, (0.9, 0.95), 1e-8)
        for gradient in gradients:
            parameter.grad = gradient
            optimizer.step()
            state = optimizer.state[parameter]
            if turns == "moments" and make is adamw.triton:  # as another run may have written them
                state |= {name: state[name].T.contiguous().T for name in ("exp_avg", "exp_avg_sq")}
        results.append([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() < 3e-7


@pytest.mark.parametrize("kept", [1.0, 0.7, 0.5, 0.2])
@pytest.mark.parametrize("device", DEVICES)
def test_the_pull_is_reptile_s_and_keeping_all_changes_nothing(device, kept):
    results = []
    for anchored in (False, True):
        master, anchor, gradient, mean, square = tensors([333] * 5, 1, torch.float32, device)
        square.abs_()
        update([master], [gradient], [mean], [square], torch.tensor(2.0, device=device), **NUMBERS,
               anchors=[anchor] if anchored else None, kept=kept)  # fmt: skip
        results.append(master)
    anchor = tensors([333] * 5, 1, torch.float32, device)[1]
    pulled = torch.lerp(anchor, results[0], kept) if kept < 1 else results[0]
    assert torch.equal(results[1], pulled) if kept == 1 else torch.allclose(results[1], pulled, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_it_has_the_same_bits_when_it_is_made_again(device):
    results = []
    for _ in range(2):
        master, gradient, mean, square = tensors([2077] * 4, 1, torch.float32, device)
        mean, square = mean.bfloat16(), square.abs().bfloat16()
        update([master], [gradient], [mean], [square], torch.tensor(2.0, device=device), **NUMBERS, seed=7)
        results.append([master, mean, square])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def drawn(device: torch.device, step: float = 1.0, seed: int = 0, lengths: tuple[int, ...] = (4096,)) -> Tensor:
    """First moments in bf16 after an update whose exact outcome lies 0.3 of the way between two numbers of bf16."""
    gradients = [torch.full((n,), 10 * (1 + 0.3 * 2**-7), device=device) for n in lengths]
    masters = [torch.zeros_like(g) for g in gradients]
    means, squares = ([torch.zeros_like(g, dtype=torch.bfloat16) for g in gradients] for _ in range(2))
    update(masters, gradients, means, squares, torch.tensor(step, device=device), **NUMBERS, seed=seed)
    return torch.cat(means)


@pytest.mark.parametrize("device", DEVICES)
def test_moments_of_16_bits_are_rounded_up_as_often_as_they_are_on_the_way(device):
    means = drawn(device)
    assert set(means.tolist()) == {1.0, 1.0 + 2**-7}
    share = float((means > 1).float().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4096) ** 0.5  # four deviations


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_drawn_depends_on_seed_step_and_element_alone(device):
    means = drawn(device, lengths=(96,))
    assert torch.equal(means, drawn(device, lengths=(96,)))
    assert torch.equal(means, drawn(device, lengths=(1, 30, 65)))
    assert not torch.equal(means, drawn(device, lengths=(96,), seed=1))
    assert not torch.equal(drawn(device, 2.0, lengths=(96,)), drawn(device, 3.0, lengths=(96,)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_two_moments_are_not_rounded_by_the_same_draw(device):
    # Both lie half way between two numbers of bf16: 0.1 g and 0.05 g^2 with g = 10 (1 + 2^-8).
    gradient = torch.full((512,), 10 * (1 + 2**-8), device=device)
    mean, square = (torch.zeros(512, dtype=torch.bfloat16, device=device) for _ in range(2))
    update([torch.zeros_like(gradient)], [gradient], [mean], [square], torch.tensor(1.0, device=device), **NUMBERS)
    is_up, is_square_up = mean > 1, square > square.min()
    assert 0.35 < float((is_up == is_square_up).float().mean()) < 0.75


@pytest.mark.parametrize("device", DEVICES)
def test_changes_too_small_for_bf16_are_not_lost_in_the_mean(device):
    """A moment that falls by 0.1 % a step, where bf16 has steps of 0.4 % and more, would stand still if rounded."""
    mean, square = (torch.ones(1024, dtype=torch.bfloat16, device=device) for _ in range(2))
    master, gradient = torch.zeros(1024, device=device), torch.zeros(1024, device=device)
    numbers = {**NUMBERS, "betas": (0.9, 0.999)}
    for step in range(1, 31):
        update([master], [gradient], [mean], [square], torch.tensor(float(step), device=device), **numbers)
    assert abs(float(square.float().mean()) - 0.999**30) < 0.002


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_a_number_or_infinite_stays_so_in_16_bits(device):
    # All bits set, which is what a GPU makes; the largest number; infinity.
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800000, 0x7FC00000], dtype=torch.int32)
    gradient = bits.view(torch.float32).to(device)
    mean, square = (torch.zeros(4, dtype=torch.bfloat16, device=device) for _ in range(2))
    update([torch.zeros(4, device=device)], [gradient], [mean], [square], torch.tensor(1.0, device=device), **NUMBERS)
    assert mean.isnan().tolist() == [True, True, False, True] and mean[2] == torch.inf
    assert square.isnan().tolist() == [True, True, False, True] and square[2] == torch.inf


def test_masters_where_no_kernel_can_run_are_told(monkeypatch):
    monkeypatch.setattr(adamw, "why_not", lambda device: f"Triton has no {device.type}")
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = adamw.triton([{"params": [parameter]}], 0.01, (0.9, 0.95), 1e-8)
    with pytest.raises(ValueError, match="kernels.adamw = triton with masters on cpu: Triton has no cpu; use torch"):
        optimizer.step()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            lambda ones: ones[0].bfloat16(),
            "a parameter of torch.bfloat16: it updates torch.float32 alone; keep masters in fp32, or use torch",
        ),
        (
            lambda ones: ones[:, ::2],
            "a parameter of shape [2, 3] and strides [6, 2]: there are gaps between its elements in memory; "
            "make it contiguous, or use torch",
        ),
        (
            lambda ones: ones[:, :1].expand(2, 3),
            "a parameter of shape [2, 3] and strides [6, 0]: there are gaps between its elements in memory; "
            "make it contiguous, or use torch",
        ),
    ],
    ids=["bf16", "gaps", "expanded"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_parameters_that_the_kernel_cannot_update_are_told_before_any_is(device, wrong, told):
    ones = torch.ones(2, 6, device=device)
    parameters = [torch.nn.Parameter(tensor) for tensor in (ones.clone(), wrong(ones))]
    for parameter in parameters:
        parameter.grad = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    optimizer = adamw.triton([{"params": parameters}], 0.01, (0.9, 0.95), 1e-8)
    with pytest.raises(ValueError) as raised:
        optimizer.step()
    assert str(raised.value) == f"kernels.adamw = triton with {told}"
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters)
    assert not optimizer.state
