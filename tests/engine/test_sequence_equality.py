"""Training on windows that ranks share is that of one process: losses, norms, clipping, weights after ten steps."""

from __future__ import annotations

import pytest
from cpt_harness import tiny
from cpt_harness.equality import alone, assert_near, case, joined, make, train, train_all
from cpt_harness.ranks import on_ranks

from cpt.methods import Seams, reptile
from cpt.models.layers import compiled, recompute

ONE_HEAD = "llama, one head for all"
# The rest of the matrix is in test_every_mesh. Windows of 12 positions: 6 on each of two ranks, 3 on each of four.
CASES = [case("llama", 2, 1, sequence=2), case("pythia", 2, 3, sequence=2), case(ONE_HEAD, 4, 3, sequence=4)]
CASES += [case("pythia", 4, 0, sequence=2, tensor=2), case("llama", 4, 0, pipeline=2, sequence=2)]
MORE = [case(ONE_HEAD, 2, zero, sequence=2) for zero in (0, 1, 2, 3)]
MORE += [case(ONE_HEAD, 4, zero, sequence=2, tensor=2) for zero in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def spread() -> dict:
    return train_all(CASES)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_losses_norms_scores_and_weights_are_those_of_one_process_and_copies_are_equal_to_the_bit(spread, one):
    assert_near(joined(spread[one]), alone(one.model))


@pytest.mark.long
@pytest.mark.parametrize("one", MORE, ids=str)
def test_one_key_head_for_all_is_shared_on_every_stage(one):
    assert_near(joined(train_all([one])[one]), alone(one.model))


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_every_stage_clips_as_told_and_tells_the_norm_before_clipping(clip):
    expected = joined(on_ranks(1, lambda mesh: train(mesh, "llama", 1, clip=clip)))
    for of_ranks in train_all([case("llama", 2, zero, sequence=2) for zero in (0, 2)], clip=clip).values():
        assert_near(joined(of_ranks), expected)


def test_documents_that_cross_from_rank_to_rank_are_attended_to_as_in_one_process():
    cases = [case("llama", 2, 1, sequence=2), case("pythia", 4, 3, sequence=4)]
    for one, of_ranks in train_all(cases, documents=True).items():
        assert_near(joined(of_ranks), alone(one.model, documents=True))


def test_bf16_stays_near_fp32():
    cases = [case("llama", 2, zero, sequence=2) for zero in (1, 3)]
    for one, of_ranks in train_all(cases, precision="bf16").items():
        mine, reference = joined(of_ranks), alone(one.model)
        assert mine["loss"] == pytest.approx(reference["loss"], abs=0.02)
        assert mine["norm"] == pytest.approx(reference["norm"], rel=0.05)


@pytest.mark.long
def test_blocks_that_are_computed_again_or_compiled_exchange_the_same():
    (expected,) = train_all([case("llama", 2, 1, sequence=2)]).values()
    ways = [{"recomputing": recompute.Settings(mode)} for mode in ("selective", "full")]
    ways.append({"compiling": compiled.Settings(blocks=True, backend="aot_eager")})
    for way in ways:
        (of_ranks,) = train_all([case("llama", 2, 1, sequence=2)], **way).values()
        assert_near(joined(of_ranks), joined(expected), 1e-12)


class Extra(Seams):
    """A further loss that is a mean over tokens."""

    def __init__(self) -> None:
        super().__init__(reptile.Settings())

    def after_forward(self, forward):
        return forward.losses.square().mean()


def test_a_further_loss_is_the_mean_over_all_positions():
    def work(mesh):
        engine = tiny.start_engine(mesh, model=make("llama"), micro_batch=2, epsilon=1e-4, methods=[Extra()])
        results = tiny.take_steps(engine, mesh, 0, 3)
        return {"norm": [r.grad_norm for r in results], "fragments": tiny.fragments(engine)}

    (expected,) = on_ranks(1, work)
    for ranks, axes in ((2, {"sequence": 2}), (4, {"sequence": 2, "tensor": 2})):
        told = on_ranks(ranks, work, **axes)
        masters = tiny.join([one["fragments"] for one in told])
        assert all(one["norm"] == pytest.approx(expected["norm"], rel=1e-6) for one in told)
        for name, values in tiny.join([expected["fragments"]]).items():
            assert (masters[name] - values).abs().max() < 2e-6, name


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all():
    class Poison(Extra):
        def __init__(self, is_here: bool) -> None:
            super().__init__()
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

    for told in on_ranks(2, work, sequence=2):
        assert told == [[(False, True), (True, True), (False, True)]] * 4
