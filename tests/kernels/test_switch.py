"""The switch: which twin serves, and what it says of that."""

from __future__ import annotations

import pytest
import torch

from cpt_kernels import Settings, attention, choose, cross_entropy, rms_norm

CPU = torch.device("cpu")
OPERATIONS = {"attention", "rms_norm", "layer_norm", "rotary", "swiglu", "gelu", "cross_entropy", "adamw"}


def test_every_operation_is_served_and_told():
    kernels = choose(Settings(), CPU)
    assert set(kernels.told) == OPERATIONS
    assert all(kernels.told.values())


def test_a_twin_that_is_asked_for_serves():
    kernels = choose(Settings(attention="torch", cross_entropy="chunked"), CPU)
    assert kernels.attention is attention.fused
    assert kernels.linear_cross_entropy is cross_entropy.chunked
    assert kernels.told["attention"] == "torch (asked for)"


def test_all_plain_overrides_every_single_choice():
    kernels = choose(Settings(all="plain", attention="torch"), CPU)
    assert kernels.attention is attention.plain
    assert kernels.rms_norm is rms_norm.plain
    assert all(told == "plain (asked for)" for told in kernels.told.values())


def test_unknown_twins_are_told_all_at_once_with_the_known_ones():
    with pytest.raises(ValueError) as raised:
        choose(Settings(attention="flash9", all="torch"), CPU)
    assert str(raised.value).splitlines() == [
        "kernels.attention = flash9 is not known; use auto, plain, torch",
        "kernels.all = torch is not known; use auto, plain",
    ]


def test_the_switch_makes_the_same_choice_on_a_gpu_without_asking_it():
    kernels = choose(Settings(), torch.device("cuda"))
    assert kernels.attention is attention.fused
