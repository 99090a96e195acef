"""Tensor parallel training is that of one process: losses, gradient norms, clipping and weights after ten steps."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.equality import MODELS, alone, assert_near, case, joined, make, train, train_all
from cpt_harness.ranks import on_ranks

from cpt.config import Fault
from cpt.methods import Seams, reptile
from cpt.progress import Progress

# One of each kind; test_every_mesh has them all.
CASES = [case("llama", 2, zero, tensor=2) for zero in (1, 3)] + [case("pythia, tied, sequential", 2, 0, tensor=2)]
CASES += [case("llama, one head for all", 4, 3, tensor=4)]  # fewer key heads than ranks


@pytest.fixture(scope="module")
def spread() -> dict:
    return train_all(CASES)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_losses_norms_and_weights_are_those_of_one_process_and_copies_are_equal_to_the_bit(spread, one):
    assert_near(joined(spread[one]), alone(one.model))


def test_the_reference_learns_and_is_clipped():
    for name in MODELS:
        one = alone(name)
        assert one["loss"][-1] < one["loss"][0] - 0.3, name
        assert min(one["norm"]) > 1.0, "the clip of 1.0 must matter in every step"


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_stage_clips_as_told_and_tells_the_norm_before_clipping(clip):
    expected = joined(on_ranks(1, lambda mesh: train(mesh, "llama", 1, clip=clip)))
    for of_ranks in train_all([case("llama", 2, zero, tensor=2) for zero in (0, 2)], clip=clip).values():
        assert_near(joined(of_ranks), expected)


def test_attention_and_loss_within_documents_are_those_of_one_process():
    for one, of_ranks in train_all(
        [case(name, 2, 1, tensor=2) for name in ("llama", "pythia")], documents=True
    ).items():
        assert_near(joined(of_ranks), alone(one.model, documents=True))


def test_bf16_stays_near_fp32_and_copies_are_equal_to_the_bit():
    for of_ranks in train_all([case("llama", 2, zero, tensor=2) for zero in (1, 3)], precision="bf16").values():
        mine = joined(of_ranks)
        assert mine["loss"] == pytest.approx(alone("llama")["loss"], abs=0.02)
        assert mine["norm"] == pytest.approx(alone("llama")["norm"], rel=0.05)


def test_without_the_marks_of_parts_the_norm_would_be_told_wrongly(monkeypatch):
    monkeypatch.setattr("cpt.engine.engine.mark_parts", lambda model: None)
    (of_ranks,) = train_all([case("llama", 2, 1, tensor=2)]).values()
    assert of_ranks[0]["norm"][0] < 0.95 * alone("llama")["norm"][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("zero_hpz_partition_size", 2), ("zero_quantized_gradients", True)],
)
def test_settings_of_deepspeed_that_would_mix_the_parts_of_a_layer_are_refused(name, value):
    def work(mesh):
        with pytest.raises(Fault) as caught:
            train(mesh, "llama", 3, deepspeed={"zero_optimization": {name: value}})
        return list(caught.value.lines)

    for lines in on_ranks(2, work, tensor=2):
        assert lines == [
            f"deepspeed.zero_optimization.{name} with mesh.tensor = 2: DeepSpeed would make groups of neighbouring "
            "ranks, which hold different parts of a layer; leave one of them out"
        ]


@pytest.mark.parametrize(
    ("zero", "block"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "contiguous_gradients": False}),
        (3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
    ids=str,
)
def test_settings_of_deepspeed_that_only_change_where_things_lie_change_no_result(zero, block):
    told = on_ranks(4, lambda mesh: train(mesh, "llama", zero, deepspeed={"zero_optimization": block}), tensor=2)
    assert_near(joined(told), alone("llama"))


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all():
    class Poison(Seams):
        def __init__(self, is_here: bool) -> None:
            super().__init__(reptile.Settings())
            self.is_here = is_here

        def after_forward(self, forward):
            return forward.losses.mean() * float("nan") if self.is_here and forward.progress.step == 1 else None

    def work(mesh):
        told = []
        for zero in (0, 1, 2, 3):
            engine = tiny.start_engine(mesh, zero=zero, model=make("llama"), methods=[Poison(mesh.rank == 1)])
            results = tiny.take_steps(engine, mesh, 0, 3)
            told.append([(r.skipped, r.loss == r.loss) for r in results])
        return told

    for told in on_ranks(2, work, tensor=2):
        assert told == [[(False, True), (True, True), (False, True)]] * 4


def test_asked_to_stop_on_one_tensor_rank_is_told_to_all():
    def work(mesh):
        engine = tiny.start_engine(mesh, model=make("llama"))
        sources = torch.zeros(8, dtype=torch.int64)
        asked = [mesh.rank == 1, False]
        return [
            engine.step(tiny.windows_of_step(0), sources, 1, 1e-3, Progress(), is_asked).stop_asked
            for is_asked in asked
        ]

    assert on_ranks(2, work, tensor=2) == [[True, False]] * 2
