"""Tensor parallel training is that of one process: losses, gradient norms, clipping and weights after ten steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.config import Fault, build
from cpt.methods import Seams, reptile
from cpt.models import pythia
from cpt.progress import Progress
from cpt_kernels import Settings, choose

NUM_STEPS = 10
# Products are summed in another order: measured 1.3e-7 in losses of 3 to 4.5, 5e-7 in norms of 1 to 3, 6e-7 in weights.
TOLERANCE = 2e-6
# Odd sizes throughout: a vocabulary that no number of ranks divides, a width that is no power of 2.
_LLAMA = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, width=24, head_width=6, mlp_width=20)
_PYTHIA = pythia.Settings(
    vocabulary=61, width=24, layers=2, heads=4, mlp_width=20, rotary_share=0.5, longest_sequence=16, initial_std=0.2
)
MODELS = {
    "llama": _LLAMA,
    "llama, tied, all biases": dataclasses.replace(_LLAMA, tied=True, attention_bias="all", mlp_bias=True),
    "llama, one head for all": dataclasses.replace(_LLAMA, kv_heads=1, attention_bias="qkv"),
    "pythia": _PYTHIA,
    "pythia, tied, sequential": dataclasses.replace(_PYTHIA, tied=True, has_parallel_residual=False),
}
# (model, ranks, tensor, ZeRO stage)
CASES = [(name, ranks, 2, zero) for name in ("llama", "pythia") for ranks in (2, 4) for zero in (0, 1, 2, 3)]
CASES += [("llama, tied, all biases", 2, 2, 1), ("llama, tied, all biases", 2, 2, 3)]
CASES += [("pythia, tied, sequential", 2, 2, 2), ("llama, one head for all", 2, 2, 0)]
CASES += [("llama", 4, 4, 1), ("llama, one head for all", 4, 4, 3)]  # fewer key heads than ranks, and one for two


def starts_of_step(step: int) -> torch.Tensor:
    """Documents of every length, in some windows none but the window."""
    chances = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0, 0.0]).roll(step)[:, None]
    return torch.rand(8, tiny.LENGTH + 1, generator=torch.Generator().manual_seed(70 + step)) < chances


def make(name: str):
    return lambda: build(MODELS[name], "Model", choose(Settings(), torch.device("cpu")))


def train(mesh, name: str, zero: int, precision: str = "fp32", documents: bool = False, **more) -> dict:
    # With AdamW's usual epsilon a gradient that is 0 but for rounding, such as of Pythia's key biases, moves weights.
    more = {"micro_batch": None if mesh.size == 4 else 2, "epsilon": 1e-4, **more}
    engine = tiny.start_engine(mesh, zero=zero, model=make(name), precision=precision, **more)
    starts_of = starts_of_step if documents else None
    results = tiny.take_steps(engine, mesh, 0, NUM_STEPS, starts_of=starts_of)
    return {
        "loss": [r.loss for r in results],
        "norm": [r.grad_norm for r in results],
        "by_source": [[r.loss_by_source[0], r.loss_by_source[1]] for r in results],
        "fragments": tiny.fragments(engine),
    }


def joined(of_ranks: list[dict]) -> dict:
    """One result of all ranks, which must say the same to the bit; `join` fails where copies differ."""
    first = of_ranks[0]
    assert all((one["loss"], one["norm"]) == (first["loss"], first["norm"]) for one in of_ranks)
    return {**first, "masters": tiny.join([one["fragments"] for one in of_ranks])}


def assert_near(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], abs=tolerance)
    assert found["norm"] == pytest.approx(expected["norm"], abs=tolerance)
    assert torch.tensor(found["by_source"]).sub(torch.tensor(expected["by_source"])).abs().max() < tolerance
    assert found["masters"].keys() == expected["masters"].keys()
    for name, values in expected["masters"].items():
        assert (found["masters"][name] - values).abs().max() < tolerance, name


@pytest.fixture(scope="module")
def alone() -> dict:
    """Each model's training in one process, at ZeRO 1: what plain torch does, as test_equality shows."""
    (told,) = on_ranks(1, lambda mesh: {name: train(mesh, name, 1) for name in MODELS})
    return {name: joined([one]) for name, one in told.items()}


def train_all(cases: list, **more) -> dict:
    """The results of all ranks for every case, those of one mesh in the same processes."""
    told = {}
    for ranks, tensor in dict.fromkeys(case[1:3] for case in cases):
        here = [case for case in cases if case[1:3] == (ranks, tensor)]
        of_ranks = on_ranks(
            ranks, lambda mesh, here=here: [train(mesh, case[0], case[3], **more) for case in here], tensor=tensor
        )
        told.update({case: [results[i] for results in of_ranks] for i, case in enumerate(here)})
    return told


@pytest.fixture(scope="module")
def spread() -> dict:
    return train_all(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_norms_and_weights_are_those_of_one_process_and_copies_are_equal_to_the_bit(spread, alone, case):
    assert_near(joined(spread[case]), alone[case[0]])


def test_the_reference_learns_and_is_clipped(alone):
    for name, one in alone.items():
        assert one["loss"][-1] < one["loss"][0] - 0.3, name
        assert min(one["norm"]) > 1.0, "the clip of 1.0 must matter in every step"


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_stage_clips_as_told_and_tells_the_norm_before_clipping(clip):
    expected = joined(on_ranks(1, lambda mesh: train(mesh, "llama", 1, clip=clip)))
    for of_ranks in train_all([("llama", 2, 2, zero) for zero in (0, 1, 2, 3)], clip=clip).values():
        assert_near(joined(of_ranks), expected)


def test_attention_and_loss_within_documents_are_those_of_one_process():
    names = ("llama", "pythia")
    told = on_ranks(1, lambda mesh: [train(mesh, name, 1, documents=True) for name in names])[0]
    for (name, *_), of_ranks in train_all([(name, 2, 2, 1) for name in names], documents=True).items():
        assert_near(joined(of_ranks), joined([told[names.index(name)]]))


def test_bf16_stays_near_fp32_and_copies_are_equal_to_the_bit(alone):
    for (name, *_), of_ranks in train_all([("llama", 2, 2, zero) for zero in (1, 2, 3)], precision="bf16").items():
        mine = joined(of_ranks)
        assert mine["loss"] == pytest.approx(alone[name]["loss"], abs=0.02)
        assert mine["norm"] == pytest.approx(alone[name]["norm"], rel=0.05)


def test_without_the_marks_of_parts_the_norm_would_be_told_wrongly(alone, monkeypatch):
    monkeypatch.setattr("cpt.engine.engine.mark_parts", lambda model: None)
    ((_, of_ranks),) = train_all([("llama", 2, 2, 1)]).items()
    assert of_ranks[0]["norm"][0] < 0.95 * alone["llama"]["norm"][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("zero_hpz_partition_size", 2), ("zero_quantized_gradients", True), ("mics_shard_size", 2)],
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
def test_settings_of_deepspeed_that_only_change_where_things_lie_change_no_result(alone, zero, block):
    told = on_ranks(4, lambda mesh: train(mesh, "llama", zero, deepspeed={"zero_optimization": block}), tensor=2)
    assert_near(joined(told), alone["llama"])


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
