"""Each twin of each operation against a float64 definition, forward and backward, at odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpt_kernels import adamw, attention, cross_entropy, rms_norm, rotary, swiglu

# Largest error relative to the largest entry. bf16 keeps 8 bits: a handful of roundings on the way.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.to(dtype)


def assert_same_with_gradients(serving, definition, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Run both on the same rounded inputs, `definition` in float64; compare outputs and the gradients of all inputs."""
    narrow = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().to(torch.float64).requires_grad_() for x in narrow]
    got, expected = serving(*narrow), definition(*wide)
    weights = random(*expected.shape, seed=99)
    (got.to(torch.float64) * weights).sum().backward()
    (expected * weights).sum().backward()
    close(got, expected, dtype)
    for mine, theirs in zip(narrow, wide, strict=True):
        close(mine.grad, theirs.grad, dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (got.detach().to(torch.float64) - expected.detach()).abs().max() / expected.detach().abs().max()
    assert error <= TOLERANCES[dtype], f"relative error {error:.2e}"


def attention_by_hand(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query at a time, from its own definition."""
    rows = []
    for position in range(queries.shape[1]):
        heads = []
        for head in range(queries.shape[2]):
            group = head // (queries.shape[2] // keys.shape[2])
            past_keys, past_values = keys[:, : position + 1, group], values[:, : position + 1, group]
            scores = (past_keys * queries[:, position, None, head]).sum(-1) / queries.shape[-1] ** 0.5
            heads.append((scores.softmax(-1)[..., None] * past_values).sum(1))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("serving", [attention.plain, attention.fused, attention.by_length])
def test_attention_is_causal_softmax_over_grouped_heads(serving, groups, dtype):
    inputs = [random(2, 13, 6, 10, seed=1), random(2, 13, groups, 10, seed=2), random(2, 13, groups, 10, seed=3)]
    assert_same_with_gradients(serving, attention_by_hand, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("serving", rms_norm.TWINS.values())
def test_rms_norm_divides_by_the_root_mean_square(serving, dtype):
    def by_hand(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden / ((hidden**2).mean(-1, keepdim=True) + 0.1) ** 0.5 * weight

    inputs = [random(3, 5, 37, seed=4), random(37, seed=5)]
    assert_same_with_gradients(lambda x, w: serving(x, w, 0.1), by_hand, inputs, dtype)


@pytest.mark.parametrize("serving", rms_norm.TWINS.values())
def test_rms_norm_of_large_bf16_does_not_overflow_or_round_on_the_way(serving):
    hidden = random(4, 333, seed=6).to(torch.bfloat16) * 1e18
    weight = torch.ones(333, dtype=torch.bfloat16)
    expected = hidden.double() / hidden.double().square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(serving(hidden, weight, 1e-5), expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("serving", rotary.TWINS.values())
def test_rotary_multiplies_pairs_by_unit_complex_numbers(serving, dtype):
    def by_hand(queries: Tensor, keys: Tensor) -> Tensor:
        frequencies = 500.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
        angles = torch.arange(11, dtype=torch.float64)[:, None] * frequencies
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        results = []
        for vectors in (queries, keys):
            turned = torch.complex(vectors[..., :5], vectors[..., 5:]) * turns
            results.append(torch.cat((turned.real, turned.imag), dim=-1))
        return torch.cat(results, dim=2)

    angles = rotary.table(11, 10, 500.0, torch.device("cpu"))
    inputs = [random(2, 11, 4, 10, seed=7), random(2, 11, 2, 10, seed=8)]
    assert_same_with_gradients(lambda q, k: torch.cat(serving(q, k, angles), dim=2), by_hand, inputs, dtype)


def test_rotary_angles_are_exact_to_fp32_far_into_the_sequence():
    angles = rotary.table(4001, 64, 10000.0, torch.device("cpu"))
    exact = 4000 * 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert angles.dtype is torch.float32
    # 4000 radians in fp32 are exact to 2^-13; bf16 frequencies would be off by whole turns.
    assert (angles[0, 4000] - exact.cos()).abs().max() < 5e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("serving", swiglu.TWINS.values())
def test_swiglu_gates_by_silu(serving, dtype):
    inputs = [random(3, 7, 19, seed=9), random(3, 7, 19, seed=10)]
    assert_same_with_gradients(serving, lambda gate, up: gate / (1 + (-gate).exp()) * up, inputs, dtype)


def losses_by_hand(targets: Tensor):
    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(targets == cross_entropy.IGNORED, 0.0, logits.exp().sum(-1).log() - chosen)

    return losses


def cross_entropy_by_three(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy.chunked(hidden, weight, targets, tokens_at_once=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("serving", [*cross_entropy.TWINS.values(), cross_entropy.by_size, cross_entropy_by_three])
def test_cross_entropy_is_log_sum_exp_less_the_target_and_skips_ignored_tokens(serving, dtype):
    targets = torch.randint(0, 131, (2, 7), generator=torch.Generator().manual_seed(11))
    targets[1, 3] = cross_entropy.IGNORED
    inputs = [random(2, 7, 24, seed=12), random(131, 24, seed=13) * 0.3]
    assert_same_with_gradients(lambda h, w: serving(h, w, targets), losses_by_hand(targets), inputs, dtype)


@pytest.mark.parametrize("serving", [*cross_entropy.TWINS.values(), cross_entropy_by_three])
def test_cross_entropy_of_bf16_gives_fp32_losses_of_the_shape_of_the_targets(serving):
    hidden, weight = random(2, 5, 8, seed=14, dtype=torch.bfloat16), random(9, 8, seed=15, dtype=torch.bfloat16)
    losses = serving(hidden, weight, torch.zeros(2, 5, dtype=torch.int64))
    assert losses.dtype is torch.float32 and losses.shape == (2, 5)


@pytest.mark.parametrize("target", [131, -1])
@pytest.mark.parametrize("serving", cross_entropy.TWINS.values())
def test_cross_entropy_refuses_a_target_outside_the_vocabulary(serving, target):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        serving(random(1, 2, 8, seed=16), random(131, 8, seed=17), torch.tensor([[0, target]]))


def test_chunked_cross_entropy_never_makes_all_logits(monkeypatch):
    rows_seen = []
    linear = torch.nn.functional.linear

    def watched(hidden, weight):
        rows_seen.append(len(hidden))
        return linear(hidden, weight)

    monkeypatch.setattr(cross_entropy.functional, "linear", watched)
    hidden, weight = random(10, 8, seed=18).requires_grad_(), random(9, 8, seed=19).requires_grad_()
    cross_entropy_by_three(hidden, weight, torch.zeros(10, dtype=torch.int64)).sum().backward()
    assert rows_seen == [3, 3, 3, 1, 3, 3, 3, 1]


def test_chunked_cross_entropy_leaves_a_frozen_weight_without_gradient():
    hidden, weight = random(4, 8, seed=20).requires_grad_(), random(9, 8, seed=21)
    cross_entropy_by_three(hidden, weight, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("serving", adamw.TWINS.values())
def test_adamw_follows_its_formula_and_decays_only_groups_that_say_so(serving):
    starts = [random(5, 3, seed=22, dtype=torch.float32), random(7, seed=23, dtype=torch.float32)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = serving([{"params": [parameters[0]], "weight_decay": 0.1}, {"params": [parameters[1]]}],
                        0.01, (0.9, 0.95), 1e-8)  # fmt: skip
    assert type(optimizer) is torch.optim.AdamW
    for parameter, start, decay in zip(parameters, starts, (0.1, 0.0), strict=True):
        expected, mean, square = start.double(), 0.0, 0.0
        for step in (1, 2, 3):
            gradient = random(*start.shape, seed=step)
            mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
            expected = expected * (1 - 0.01 * decay)
            expected = expected - 0.01 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
            parameter.grad = gradient.float()
            optimizer.step()
            optimizer.zero_grad()
        assert (parameter.detach() - expected).abs().max() < 1e-6
