"""The five seams of a step: when they are called, and what a method may do there, at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.config import Fault
from cpt.methods import Seams, reptile
from cpt.progress import Progress

STAGES = (0, 1, 2, 3)
LAYOUTS = [(zero, precision) for zero in STAGES for precision in ("fp32", "bf16") if zero or precision == "fp32"]


class Spy(Seams):
    """Writes down what is called; `act(seam, masters)` may do something there and say that it did."""

    def __init__(self, act=lambda seam, masters: False) -> None:
        super().__init__(reptile.Settings())
        self.calls: list[str] = []
        self._act = act

    def before_batch(self, progress):
        self.calls.append(f"before_batch {progress.step}")

    def after_forward(self, forward):
        assert forward.tokens.shape == (2, tiny.LENGTH + 1) and forward.losses.shape == (2, tiny.LENGTH)
        self.calls.append(f"after_forward {forward.progress.step}")

    def before_update(self, masters, progress):
        self.calls.append(f"before_update {progress.step}")
        self._act("before_update", masters)

    def after_update(self, masters, progress):
        self.calls.append(f"after_update {progress.step}")
        return self._act("after_update", masters)

    def end_stage(self, masters, progress):
        self.calls.append(f"end_stage {progress.step}")
        return self._act("end_stage", masters)


class ExtraLoss(Seams):
    """Adds `factor` times the loss to that of each micro-batch, in the given steps, on the given ranks."""

    def __init__(self, factor: float, steps=range(1000), is_here: bool = True) -> None:
        super().__init__(reptile.Settings())
        self._factor, self._steps, self._is_here = factor, steps, is_here

    def after_forward(self, forward):
        if self._is_here and forward.progress.step in self._steps:
            return forward.losses.mean() * self._factor
        return None


def test_each_seam_is_called_once_a_step_and_after_forward_once_a_micro_batch():
    def work(mesh):
        told = []
        for zero in STAGES:
            spy = Spy()
            engine = tiny.start_engine(mesh, zero=zero, micro_batch=2, methods=[spy])
            tiny.take_steps(engine, mesh, 0, 2)
            engine.end_stage(Progress(step=2))
            told.append(spy.calls)
        return told

    seams = ["before_batch", "after_forward", "after_forward", "before_update", "after_update"]
    expected = [f"{seam} {step}" for step in (0, 1) for seam in seams] + ["end_stage 2"]
    for of_rank in on_ranks(2, work):
        assert of_rank == [expected] * len(STAGES)


@pytest.mark.parametrize("seam", ["before_update", "after_update", "end_stage"])
def test_what_a_method_writes_into_the_masters_at_a_seam_reaches_the_model_and_stays(seam):
    def halve(where, masters):
        if where == seam:
            for piece in masters.pieces:
                piece.values.mul_(0.5)
        return where == seam

    def work(mesh):
        told = []
        for zero, precision in LAYOUTS:
            engine = tiny.start_engine(
                mesh, zero=zero, precision=precision, methods=[Spy(halve)], micro_batch=2, weight_decay=0.0
            )
            tokens = tiny.windows_of_step(0)[mesh.rank * 4 : mesh.rank * 4 + 4]
            engine.step(tokens, torch.zeros(4, dtype=torch.int64), 1, 0.0, Progress())
            if seam == "end_stage":
                engine.end_stage(Progress())
            told.append((tiny.fragments(engine), tiny.computed_with(engine)))
        return told

    model = tiny.build_llama()
    for of_ranks in zip(*on_ranks(2, work), strict=True):
        masters, computed = tiny.join([fragments for fragments, _ in of_ranks]), of_ranks[0][1]
        for name, values in masters.items():
            assert torch.equal(values, model.initial_value(name, tiny.SEED) * 0.5), name
            assert torch.equal(computed[name], values.to(computed[name].dtype)), name


def test_a_further_loss_adds_its_gradient_and_is_not_told_as_loss():
    def work(mesh):
        told = []
        for zero in STAGES:
            for methods in ([], [ExtraLoss(1.0)]):
                engine = tiny.start_engine(mesh, zero=zero, micro_batch=2, methods=methods)
                told.append([(r.loss, r.grad_norm) for r in tiny.take_steps(engine, mesh, 0, 1)][0])
        return told

    for told in on_ranks(2, work):
        for (loss, norm), (same_loss, twice) in zip(told[::2], told[1::2], strict=True):
            assert same_loss == loss
            assert twice == pytest.approx(2 * norm, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all_and_the_next_is_made(value):
    def work(mesh):
        told = []
        for zero, precision in LAYOUTS:
            spy = Spy()
            poison = ExtraLoss(value, steps=[1], is_here=mesh.rank == mesh.size - 1)
            engine = tiny.start_engine(mesh, zero=zero, precision=precision, micro_batch=2, methods=[poison, spy])
            first = tiny.take_steps(engine, mesh, 0, 1)[0]
            before, updates = tiny.fragments(engine), engine.masters.num_updates
            skipped = tiny.take_steps(engine, mesh, 1, 2)[0]
            same = all(torch.equal(a[3], b[3]) for a, b in zip(before, tiny.fragments(engine), strict=True))
            same = same and engine.masters.num_updates == updates == 1
            third = tiny.take_steps(engine, mesh, 2, 3)[0]
            changed = not any(torch.equal(a[3], b[3]) for a, b in zip(before, tiny.fragments(engine), strict=True))
            told.append((first.skipped, skipped.skipped, third.skipped, same, changed, skipped.grad_norm,
                         third.loss, spy.calls.count("after_update 1")))  # fmt: skip
        return told

    for told in on_ranks(2, work):
        for layout, (first, second, third, same, changed, norm, loss, calls) in zip(LAYOUTS, told, strict=True):
            assert (first, second, third) == (False, True, False), layout
            assert same and changed, layout
            assert norm != norm or norm == float("inf"), layout
            assert loss == pytest.approx(4.1, abs=0.5) and calls == 0, layout


def test_being_asked_to_stop_on_one_rank_is_told_to_all():
    def work(mesh):
        engine = tiny.start_engine(mesh)
        here = 8 // mesh.size
        tokens = tiny.windows_of_step(0)[mesh.rank * here : (mesh.rank + 1) * here]
        sources = torch.zeros(here, dtype=torch.int64)
        asked = [mesh.rank == 1, False]
        return [engine.step(tokens, sources, 1, 1e-3, Progress(), is_asked).stop_asked for is_asked in asked]

    assert on_ranks(2, work) == [[True, False]] * 2


def test_a_source_that_no_window_of_the_step_is_from_has_no_loss():
    def work(mesh):
        engine = tiny.start_engine(mesh)
        sources = torch.full((4,), 2 if mesh.rank else 0)
        result = engine.step(tiny.windows_of_step(0)[mesh.rank * 4 :][:4], sources, 3, 1e-3, Progress())
        return result.loss_by_source, result.loss

    (first, loss), second = on_ranks(2, work)
    assert sorted(first) == [0, 2] and second == (first, loss)
    assert (first[0] + first[2]) / 2 == pytest.approx(loss, rel=1e-12)


def test_scores_are_those_of_the_weights_and_change_nothing():
    def work(mesh):
        told = []
        for zero in STAGES:
            losses = []
            for scored in (False, True):
                engine = tiny.start_engine(mesh, zero=zero)
                if scored:
                    told.append(engine.score(tiny.windows_of_step(7)))
                first = tiny.take_steps(engine, mesh, 0, 2)
                if scored:
                    engine.score(tiny.windows_of_step(7)[:3])
                losses.append([r.loss for r in [*first, *tiny.take_steps(engine, mesh, 2, 4)]])
            assert losses[0] == losses[1]
        return told

    model = tiny.build_llama()
    model.initialise(tiny.SEED)
    tokens = tiny.windows_of_step(7)
    expected = model(tokens[:, :-1], tokens[:, 1:]).detach().sum(dim=1, dtype=torch.float64)
    for of_rank in on_ranks(2, work):
        for found in of_rank:
            assert found.dtype == torch.float64 and (found - expected).abs().max() < 1e-4


def test_nothing_is_printed_but_what_is_logged(capfd):
    def work(mesh):
        for zero, precision in LAYOUTS:
            tiny.take_steps(tiny.start_engine(mesh, zero=zero, precision=precision), mesh, 0, 1)

    capfd.readouterr()
    on_ranks(1, work)
    assert capfd.readouterr().out == ""


def test_a_batch_that_cannot_be_cut_over_the_ranks_is_a_fault():
    def work(mesh):
        with pytest.raises(Fault, match="batch.windows = 7 cannot be cut over 2 ranks"):
            tiny.start_engine(mesh, windows=7)

    on_ranks(2, work)
