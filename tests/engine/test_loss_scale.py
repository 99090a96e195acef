"""fp16 trains like fp32, loses no window to an overflow, and goes on with the scale that it had."""

from __future__ import annotations

import pytest
from cpt_harness import tiny
from cpt_harness.equality import alone, assert_near, joined, train
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, read_settings
from cpt.engine import settings as engine_settings
from cpt.engine.loss_scale import LossScale, Settings, refuse_without_fp16
from cpt.methods import Seams, reptile

# fp16 keeps 11 bits: measured 7.4e-4 in losses of 3 to 4.5, 0.004 in norms of 1 to 3, 0.0016 in weights in ten steps.
TOLERANCE = 0.008
TOO_HIGH = Settings(initial=2.0**24)
GROWING = Settings(initial=1024, growth_steps=2)
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
# (axes of the mesh, ZeRO stage, scale, DeepSpeed's settings)
CASES = [
    ((), 1, Settings(), {}),
    ((), 1, TOO_HIGH, {}),
    ((), 3, TOO_HIGH, {}),
    ((), 2, TOO_HIGH, OFFLOADED),
    ((("tensor", 2),), 3, GROWING, {}),
    ((("pipeline", 2),), 1, TOO_HIGH, {}),
    ((("sequence", 2),), 2, TOO_HIGH, {}),
]


class Calls(Seams):
    """Remembers which seams were called."""

    def __init__(self) -> None:
        super().__init__(reptile.Settings())
        self.calls: list[str] = []

    def before_batch(self, progress):
        self.calls.append("before_batch")

    def after_forward(self, forward):
        self.calls.append("after_forward")

    def before_update(self, masters, progress):
        self.calls.append("before_update")

    def after_update(self, masters, progress):
        self.calls.append("after_update")
        return False


@pytest.fixture(scope="module")
def trained() -> dict:
    told = {}
    for axes in dict.fromkeys(case[0] for case in CASES):
        here = [case for case in CASES if case[0] == axes]

        def work(mesh, here=here):
            tiny.let_the_cpu_train_in_fp16()
            return [train(mesh, "llama", zero, "fp16", scale=scale, deepspeed=ds) for _, zero, scale, ds in here]

        of_ranks = on_ranks(2, work, seconds=120, **dict(axes))
        told.update({index: [of_rank[i] for of_rank in of_ranks] for i, index in enumerate(map(CASES.index, here))})
    return told


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_losses_norms_and_weights_stay_near_those_of_fp32(trained, index):
    assert_near(joined(trained[index]), alone("llama"), TOLERANCE)


def test_a_scale_that_was_too_high_gives_what_one_that_fits_gives(trained):
    # Powers of two only move the exponent; measured 0, but an entry that vanished at one scale need not at another.
    assert_near(joined(trained[1]), joined(trained[0]), 1e-5)


def test_an_overflow_costs_tries_and_neither_windows_nor_seams():
    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        told = []
        for zero in (1, 2, 3):
            calls = Calls()
            engine = tiny.start_engine(
                mesh, zero=zero, precision="fp16", micro_batch=2, methods=[calls], scale=TOO_HIGH
            )
            tiny.take_steps(engine, mesh, 0, 1)
            told.append((engine.report(), calls.calls, engine.masters.num_updates))
        return told

    for report, calls, num_updates in on_ranks(1, work)[0]:
        retries = report["retries"]
        assert retries > 3 and report["loss_scale"] == 2.0 ** (24 - retries)
        assert calls == ["before_batch", *["after_forward"] * 4 * (retries + 1), "before_update", "after_update"]
        assert num_updates == 1


def test_at_the_smallest_scale_and_with_a_fixed_one_a_step_that_overflows_is_skipped_and_told():
    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        told = []
        for scale in (Settings(initial=2.0**24, smallest=2.0**23), Settings(fixed=2.0**24)):
            engine = tiny.start_engine(mesh, precision="fp16", scale=scale)
            (result,) = tiny.take_steps(engine, mesh, 0, 1)
            told.append((result.skipped, result.loss == result.loss, engine.report()["retries"]))
        return told

    assert on_ranks(1, work) == [[(True, True, 1), (True, True, 0)]]


def test_a_loss_that_is_not_finite_is_not_tried_again():
    class Poison(Calls):
        def after_forward(self, forward):
            super().after_forward(forward)
            return forward.losses.mean() * float("nan")

    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        poison = Poison() if mesh.rank == 1 else Calls()
        engine = tiny.start_engine(mesh, precision="fp16", methods=[poison])
        (result,) = tiny.take_steps(engine, mesh, 0, 1)
        return result.skipped, poison.calls, engine.report()

    for skipped, calls, report in on_ranks(2, work):
        assert skipped and calls == ["before_batch", "after_forward"]
        assert report == {"loss_scale": 65536.0, "retries": 0}


def test_deepspeeds_own_scaler_would_halve_the_gradients_of_a_step_after_which_it_doubles_the_scale():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        told = []
        for is_ours in (True, False):
            engine = tiny.start_engine(mesh, zero=3, precision="fp16", scale=Settings(initial=1024, growth_steps=1))
            if not is_ours:
                engine._train = engine._run.train
                engine._engine.optimizer.loss_scaler = DynamicLossScaler(1024, 1, 1, 1, False)
            told.append([result.grad_norm for result in tiny.take_steps(engine, mesh, 0, 3)])
        return told

    ((ours, theirs),) = on_ranks(1, work)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    assert any(ratio == pytest.approx(2.0, rel=0.05) for ratio in ratios), ratios


@pytest.mark.parametrize("zero", [1, 3])
def test_a_resume_at_any_stage_has_the_scale_and_the_tries_of_a_run_that_was_not_stopped(tmp_path, zero):
    scale = Settings(initial=2.0**24, growth_steps=3)

    def steps(engine, mesh, first, last):
        told = []
        for step in range(first, last):
            (result,) = tiny.take_steps(engine, mesh, step, step + 1)
            told.append((result.loss, result.grad_norm, *engine.report().values()))
        return told

    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        engine = tiny.start_engine(mesh, zero=zero, precision="fp16", scale=scale)
        before = steps(engine, mesh, 0, 5)
        engine.save(tmp_path / "checkpoint", {})
        unbroken = steps(engine, mesh, 5, 10)
        told = []
        for stage in (1, 2, 3):
            resumed = tiny.start_engine(mesh, zero=stage, precision="fp16", scale=scale, fill=False)
            resumed.load(Checkpoint(tmp_path / "checkpoint"), with_optimizer=True, with_methods=True)
            told.append(steps(resumed, mesh, 5, 10))
        return before, unbroken, told

    for before, unbroken, resumed in on_ranks(2, work):
        assert len({scale for *_, scale, _ in before + unbroken}) > 1, "the scale must move"
        assert resumed[zero - 1] == unbroken
        for other in resumed:
            assert [tries[2:] for tries in other] == [tries[2:] for tries in unbroken]


def test_the_scale_grows_after_so_many_updates_and_halves_with_each_overflow():
    scale = LossScale(Settings(initial=8, growth_steps=2, smallest=2))
    used = []
    for is_good in (True, True, True, False, True, True, False, False, False):
        used.append(scale.begin_try())
        if is_good:
            scale.end_good_try()
        else:
            scale.lower()
    assert used == [8, 8, 16, 16, 8, 8, 16, 8, 4]
    assert scale.scale == 2 and not scale.lower() and scale.scale == 2
    other = LossScale(Settings(initial=8, growth_steps=2, smallest=2))
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()


def test_a_fixed_scale_stays():
    scale = LossScale(Settings(fixed=128, growth_steps=1))
    scale.end_good_try()
    scale.load_state_dict({"scale": 4.0, "good_updates": 1})
    assert scale.begin_try() == 128 and not scale.lower()


@pytest.mark.parametrize(
    ("plain", "line"),
    [
        ({"initial": 1000}, "initial = 1000: a power of two, such as 512, so that scaling rounds nothing"),
        ({"smallest": 0}, "smallest = 0: a power of two, such as 65536, so that scaling rounds nothing"),
        ({"fixed": 3}, "fixed = 3: a power of two, such as 2, so that scaling rounds nothing"),
        ({"growth_steps": 0}, "growth_steps = 0: at least 1"),
        ({"initial": 2, "smallest": 4}, "smallest = 4: not above initial = 2"),
    ],
)
def test_scales_that_cannot_be_meant_are_faults(plain, line):
    with pytest.raises(Fault) as caught:
        read_settings(Settings, plain)
    assert list(caught.value.lines) == [line]


def test_what_does_not_go_with_fp16_or_without_it_is_a_fault():
    assert engine_settings.Settings("bf16", loss_scale=Settings(initial=2)).faults() == [
        "loss_scale with precision = bf16: only fp16 scales its loss; leave it out"
    ]
    assert engine_settings.Settings("fp16", zero=0).faults() == [
        "zero = 0 with precision = fp16: DeepSpeed takes an optimiser step of its own before the first one and decays "
        "the weights; use zero = 1, which costs nothing more, or precision = fp32"
    ]
    assert engine_settings.Settings("fp16", loss_scale=Settings(initial=2)).faults() == []


def test_a_cpu_without_the_instructions_for_it_is_refused(monkeypatch):
    import torch
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: None)
    with pytest.raises(Fault) as caught:
        refuse_without_fp16(torch.device("cpu"))
    assert list(caught.value.lines) == [
        "precision = fp16: DeepSpeed does not train in it on this cpu, which must have AVX-512 FP16 for it; use bf16 "
        "or fp32"
    ]
