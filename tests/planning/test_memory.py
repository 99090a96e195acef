"""Bytes of model state a rank, against the numbers of the ZeRO paper."""

import pytest

from cpt.planning.memory import model_state


def test_a_model_on_one_rank_takes_eighteen_bytes_a_parameter_in_bf16():
    state = model_state(1000, "bf16", zero=1, num_ranks=1)
    assert (state.weights, state.gradients, state.optimizer) == (2000, 4000, 12000)


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [(1, 2000, 4000, 3000), (2, 2000, 1000, 3000), (3, 500, 1000, 3000)],
)
def test_each_zero_stage_cuts_one_thing_more(zero, weights, gradients, optimizer):
    state = model_state(1000, "bf16", zero=zero, num_ranks=4)
    assert (state.weights, state.gradients, state.optimizer) == (weights, gradients, optimizer)


def test_at_stage_0_the_weights_are_the_masters():
    state = model_state(1000, "fp32", zero=0, num_ranks=4)
    assert (state.weights, state.optimizer) == (4000, 8000)


def test_an_anchor_is_cut_like_the_optimizer():
    assert model_state(1000, "bf16", zero=1, num_ranks=4, num_copies=1).methods == 1000


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2000), ("fp32", 4000)])
def test_a_teacher_is_whole_on_every_rank_in_the_models_precision(precision, size):
    for zero in (1, 3):
        assert model_state(1000, precision, zero, num_ranks=4, num_whole_copies=1).methods == size
