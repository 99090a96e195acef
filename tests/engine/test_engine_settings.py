"""What the engine is told: batches that can be cut, an optimiser in range, no contradiction with DeepSpeed's block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import Fault, read_settings
from cpt.engine.settings import Batch, Optimizer, Settings, deepspeed_settings


@given(st.integers(1, 200), st.none() | st.integers(1, 20), st.integers(1, 17))
def test_a_batch_that_cannot_be_cut_gets_values_that_really_can(windows, micro_batch, num_ranks):
    faults = Batch(windows, micro_batch).faults_on(num_ranks)
    if not faults:
        batch = Batch(windows, micro_batch)
        here = batch.windows_a_rank(num_ranks)
        assert here * num_ranks == windows
        assert here % batch.micro_batch_on(num_ranks) == 0
        return
    (line,) = faults
    setting, offered = line.split(" = ")[0], line.split("; use ")[1].removeprefix("one of ")
    values = [int(word) for word in offered.replace(" or ", ", ").split(", ")]
    assert values
    assert len(set(values)) == len(values)
    for value in values:
        changed = Batch(value, micro_batch) if setting == "batch.windows" else Batch(windows, value)
        assert changed.faults_on(num_ranks) == []


@pytest.mark.parametrize(
    ("batch", "num_ranks", "told"),
    [
        (Batch(10), 4, "batch.windows = 10 cannot be cut over 4 ranks; use 8 or 12"),
        (Batch(3), 4, "batch.windows = 3 cannot be cut over 4 ranks; use 4"),
        (Batch(10, 3), 4, "batch.windows = 10 cannot be cut over 4 ranks; use 12"),
        (Batch(30, 3), 4, "batch.windows = 30 cannot be cut over 4 ranks; use 24 or 36"),
        (
            Batch(24, 5),
            2,
            "batch.micro_batch = 5 does not divide the 12 windows a rank has in a step; use one of 1, 2, 3, 4, 6, 12",
        ),
        (
            Batch(8, 16),
            1,
            "batch.micro_batch = 16 does not divide the 8 windows a rank has in a step; use one of 1, 2, 4, 8",
        ),
    ],
)
def test_the_offer_is_told_with_the_value(batch, num_ranks, told):
    assert batch.faults_on(num_ranks) == [told]


def test_a_micro_batch_is_all_windows_of_a_rank_unless_told():
    assert Batch(24).micro_batch_on(4) == 6
    assert Batch(24, 2).micro_batch_on(4) == 2


@pytest.mark.parametrize(
    ("kind", "plain", "lines"),
    [
        (Batch, {"windows": 0}, ["windows = 0: at least 1"]),
        (Batch, {"windows": -4, "micro_batch": 0}, ["windows = -4: at least 1", "micro_batch = 0: at least 1"]),
        (Optimizer, {"beta1": 1}, ["beta1 = 1.0: at least 0 and below 1"]),
        (Optimizer, {"beta2": -0.1}, ["beta2 = -0.1: at least 0 and below 1"]),
        (Optimizer, {"epsilon": 0, "weight_decay": -1, "clip": -1},
         ["epsilon = 0.0: too small", "weight_decay = -1.0: too small", "clip = -1.0: too small"]),
        (Settings, {"zero": 0}, [
            "zero = 0 with precision = bf16: DeepSpeed takes an optimiser step of its own before the first one and "
            "decays the weights; use zero = 1, which costs nothing more, or precision = fp32"
        ]),
        (Settings, {"precision": "fp15"}, ["precision = 'fp15' is not known; did you mean fp32 or fp16 or bf16?"]),
    ],
)  # fmt: skip
def test_settings_outside_their_range_are_faults(kind, plain, lines):
    with pytest.raises(Fault) as caught:
        read_settings(kind, plain)
    assert [line.split("; did you")[0] for line in caught.value.lines] == [line.split("; did you")[0] for line in lines]


def test_deepspeed_is_told_what_the_settings_say():
    settings = Settings(precision="fp32", zero=2, batch=Batch(24, 3), optimizer=Optimizer(clip=0.5))
    made = deepspeed_settings(settings, 4)
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"] == {"stage": 2}
    assert "bf16" not in made


def test_bf16_adds_up_its_gradients_in_fp32():
    made = deepspeed_settings(Settings(precision="bf16"), 1)
    assert made["bf16"] == {"enabled": True}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(("precision", "made"), [("bf16", {"grad_accum_dtype": "fp32"}), ("fp32", None)])
def test_auto_inside_a_block_is_left_out_too(precision, made):
    block = {
        "data_types": {"grad_accum_dtype": "auto"},
        "zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": "auto"}},
    }
    settings = deepspeed_settings(Settings(precision=precision, deepspeed=block), 1)
    assert settings.get("data_types") == made
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_deepspeed_does_not_clip_where_the_engine_does():
    assert deepspeed_settings(Settings(precision="fp32", zero=0), 1)["gradient_clipping"] == 0.0


def test_deepspeeds_own_settings_are_passed_through_without_what_is_auto():
    block = {
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
        "zero_optimization": {"stage": "auto", "overlap_comm": False, "reduce_bucket_size": "auto"},
        "data_types": "auto",
    }
    made = deepspeed_settings(Settings(deepspeed=block), 2)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert "train_batch_size" not in made
    assert block["zero_optimization"]["stage"] == "auto"  # what was set stays as it was
