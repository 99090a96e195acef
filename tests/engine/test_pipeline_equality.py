"""Training through a pipeline is that of one process: losses, gradient norms, clipping and weights after ten steps."""

from __future__ import annotations

import pytest
from cpt_harness import tiny
from cpt_harness.equality import alone, assert_near, case, joined, make, train, train_all
from cpt_harness.ranks import on_ranks

from cpt.methods import Seams, reptile

TIED = ("llama, tied, all biases", "pythia, tied, sequential")
# Models have three blocks, so that two parts are uneven; an embedding that is tied lies on the first part and the last.
# One of each kind; test_every_mesh has them all.
CASES = [case("llama", 2, 0, pipeline=2), case("pythia", 2, 1, pipeline=2), case(TIED[0], 3, 1, pipeline=3)]
CASES += [case(TIED[1], 4, 0, pipeline=2), case("pythia", 4, 1, pipeline=2, tensor=2)]
CASES += [case(TIED[0], 4, 1, pipeline=2, tensor=2)]


@pytest.fixture(scope="module")
def spread() -> dict:
    return train_all(CASES)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_losses_norms_scores_and_weights_are_those_of_one_process_and_copies_are_equal_to_the_bit(spread, one):
    assert_near(joined(spread[one]), alone(one.model))


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_part_clips_as_told_and_tells_the_norm_of_all_before_clipping(clip):
    expected = joined(on_ranks(1, lambda mesh: train(mesh, TIED[0], 1, clip=clip)))
    for of_ranks in train_all([case(TIED[0], 2, zero, pipeline=2) for zero in (0, 1)], clip=clip).values():
        assert_near(joined(of_ranks), expected)


def test_attention_and_loss_within_documents_are_those_of_one_process():
    cases = [case("llama", 2, 1, pipeline=2), case("pythia", 3, 0, pipeline=3)]
    for one, of_ranks in train_all(cases, documents=True).items():
        assert_near(joined(of_ranks), alone(one.model, documents=True))


def test_bf16_stays_near_fp32_and_tied_copies_are_equal_to_the_bit():
    for one, of_ranks in train_all([case(n, 2, 1, pipeline=2) for n in ("llama", TIED[0])], precision="bf16").items():
        mine, reference = joined(of_ranks), alone(one.model)
        assert mine["loss"] == pytest.approx(reference["loss"], abs=0.03)
        assert mine["norm"] == pytest.approx(reference["norm"], rel=0.05)


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# Precision and settings of `zero_optimization`: DeepSpeed sums gradients in another place in each.
KEPT_IN = [("fp16", {}), ("bf16", OFFLOADED), ("fp32", OFFLOADED), ("fp16", OFFLOADED)]
KEPT_IN += [(p, {"overlap_comm": True}) for p in ("fp32", "fp16")] + [("fp32", {"contiguous_gradients": False})]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_tied_copies_are_added_wherever_they_are_kept(ranks):
    def work(mesh):
        tiny.let_the_cpu_train_in_fp16()
        told = []
        for precision, block in KEPT_IN:
            engine = tiny.start_engine(
                mesh, model=make(TIED[0]), precision=precision, micro_batch=2 if ranks == 2 else 1, epsilon=1e-4,
                deepspeed={"zero_optimization": block},
            )  # fmt: skip
            results = tiny.take_steps(engine, mesh, 0, 10)
            told.append(([r.loss for r in results], [r.grad_norm for r in results], engine.differing_copies()))
        return told

    expected = alone(TIED[0])
    for kept_in, of_ranks in zip(KEPT_IN, zip(*on_ranks(ranks, work, 300.0, pipeline=2), strict=True), strict=True):
        for losses, norms, differing in of_ranks:
            assert differing == [], kept_in
            assert losses == pytest.approx(expected["loss"], abs=2e-6 if kept_in[0] == "fp32" else 0.01), kept_in
            assert norms == pytest.approx(expected["norm"], rel=2e-6 if kept_in[0] == "fp32" else 0.01), kept_in


def test_each_part_gives_a_sign_of_life_at_each_forward_and_backward_and_comes_to_no_other_place():
    def work(mesh):
        signs = []
        mesh.watch.still_alive = lambda: signs.append("still")
        mesh.watch.alive = lambda *place: signs.append("place")
        engine = tiny.start_engine(mesh, model=make("llama"), micro_batch=2)
        tiny.take_steps(engine, mesh, 0, 1)
        return signs

    first, last = on_ranks(2, work, pipeline=2)
    assert first == last and set(first) == {"still"} and len(first) > 2 and len(first) % 2 == 0


def test_tied_copies_whose_gradients_are_not_added_are_found_to_differ(monkeypatch):
    def work(mesh):
        engine = tiny.start_engine(mesh, model=make(TIED[0]), micro_batch=2)
        before = engine.differing_copies()
        tiny.take_steps(engine, mesh, 0, 1)
        equal = engine.differing_copies()
        engine._engine.module.get_tied_weights_and_groups = list
        tiny.take_steps(engine, mesh, 1, 2)
        return [before, equal, engine.differing_copies()]

    assert on_ranks(2, work, pipeline=2) == [[[], [], ["embedding.weight"]]] * 2


def test_evaluation_between_steps_with_other_shapes_changes_nothing():
    def work(mesh):
        engine = tiny.start_engine(mesh, model=make("llama"), micro_batch=2, epsilon=1e-4)
        losses = []
        for step in range(4):
            losses += [r.loss for r in tiny.take_steps(engine, mesh, step, step + 1)]
            engine.score(tiny.windows_of_step(step)[: step + 1])
            engine.score(tiny.windows_of_step(step)[:3, :8])
        return losses

    for losses in on_ranks(2, work, pipeline=2):
        assert losses == pytest.approx(alone("llama")["loss"][:4], abs=2e-6)


class Extra(Seams):
    """A further loss; counts how often each seam is called."""

    def __init__(self) -> None:
        super().__init__(reptile.Settings())
        self.calls: list[str] = []

    def after_forward(self, forward):
        self.calls.append("after_forward")
        return forward.losses.square().mean()

    def before_update(self, masters, progress):
        self.calls.append("before_update")

    def after_update(self, masters, progress):
        self.calls.append("after_update")
        return False


def test_after_forward_is_called_on_the_last_part_only_and_its_loss_reaches_all_parts():
    def work(mesh):
        method = Extra()
        engine = tiny.start_engine(mesh, model=make("llama"), micro_batch=2, epsilon=1e-4, methods=[method])
        results = tiny.take_steps(engine, mesh, 0, 3)
        return [method.calls, {"norm": [r.grad_norm for r in results], "fragments": tiny.fragments(engine)}]

    ((_, expected),) = on_ranks(1, work)
    (first, one), (last, other) = on_ranks(2, work, pipeline=2)
    assert first == ["before_update", "after_update"] * 3
    assert last == ["after_forward"] * 4 + first[:2] + (["after_forward"] * 4 + first[:2]) * 2
    assert one["norm"] == other["norm"] == pytest.approx(expected["norm"], abs=2e-6)
    masters, reference = tiny.join([one["fragments"], other["fragments"]]), tiny.join([expected["fragments"]])
    assert all((masters[name] - values).abs().max() < 2e-6 for name, values in reference.items())


def test_a_gradient_that_is_not_finite_on_the_last_part_skips_the_update_on_all():
    class Poison(Extra):
        def after_forward(self, forward):
            return forward.losses.mean() * float("nan") if forward.progress.step == 1 else None

    def work(mesh):
        told = []
        for zero in (0, 1):
            engine = tiny.start_engine(mesh, zero=zero, model=make("llama"), micro_batch=2, methods=[Poison()])
            results = tiny.take_steps(engine, mesh, 0, 3)
            told.append([(r.skipped, r.loss == r.loss) for r in results])
        return told

    for told in on_ranks(2, work, pipeline=2):
        assert told == [[(False, True), (True, True), (False, True)]] * 2


def test_reptile_pulls_the_masters_of_all_parts_as_in_one_process():
    def work(mesh):
        method = reptile.Method(reptile.Settings(every=2, step_size=0.5))
        engine = tiny.start_engine(mesh, model=make(TIED[0]), micro_batch=2, epsilon=1e-4, methods=[method])
        told = [], []
        for step in range(5):
            tiny.take_steps(engine, mesh, step, step + 1)
            told[0].append(engine.report().get("method/reptile/displacement", 0.0))
        return [told[0], tiny.fragments(engine)]

    ((lengths, expected),) = on_ranks(1, work)
    of_ranks = on_ranks(4, work, pipeline=2, tensor=2)
    assert all(one == of_ranks[0][0] for one, _ in of_ranks)
    assert of_ranks[0][0] == pytest.approx(lengths, abs=1e-5) and lengths[1] > 0.01
    masters, reference = tiny.join([fragments for _, fragments in of_ranks]), tiny.join([expected])
    assert all((masters[name] - values).abs().max() < 2e-6 for name, values in reference.items())
