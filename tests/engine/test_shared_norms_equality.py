"""Training with the stream between cut layers shared over tensor ranks is that of one process."""

from __future__ import annotations

import pytest
from cpt_harness import tiny
from cpt_harness.equality import alone, assert_near, case, joined, make, train, train_all
from cpt_harness.ranks import on_ranks

from cpt.models.layers import compiled, recompute

TIED = "llama, tied, all biases"
# The rest of the matrix is in test_every_mesh. Windows of 12 positions: 6 on each of two tensor ranks, 3 on each of
# four, or where two tensor ranks share what one of two sequence ranks has.
CASES = [case("pythia", 2, 1, tensor=2), case(TIED, 2, 3, tensor=2), case("llama", 4, 2, tensor=4)]
CASES += [case("pythia", 4, 1, sequence=2, tensor=2)]


@pytest.fixture(scope="module")
def spread() -> dict:
    return train_all(CASES, shares_norms=True)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_losses_norms_scores_and_weights_are_those_of_one_process_and_copies_are_equal_to_the_bit(spread, one):
    assert_near(joined(spread[one]), alone(one.model))


@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.long), 0.05])
def test_every_stage_clips_as_told_and_tells_the_norm_before_clipping(clip):
    expected = joined(on_ranks(1, lambda mesh: train(mesh, "pythia", 1, clip=clip)))
    cases = [case("pythia", 2, zero, tensor=2) for zero in (0, 3)]
    for of_ranks in train_all(cases, clip=clip, shares_norms=True).values():
        assert_near(joined(of_ranks), expected)


def test_attention_and_loss_within_documents_are_those_of_one_process():
    cases = [case("llama", 2, 1, tensor=2)]
    for one, of_ranks in train_all(cases, documents=True, shares_norms=True).items():
        assert_near(joined(of_ranks), alone(one.model, documents=True))


def test_bf16_stays_near_fp32_and_copies_are_equal_to_the_bit():
    cases = [case("pythia", 2, zero, tensor=2) for zero in (1, 3)]
    for one, of_ranks in train_all(cases, precision="bf16", shares_norms=True).items():
        mine, reference = joined(of_ranks), alone(one.model)
        assert mine["loss"] == pytest.approx(reference["loss"], abs=0.02)
        assert mine["norm"] == pytest.approx(reference["norm"], rel=0.05)


@pytest.mark.long
def test_blocks_that_are_computed_again_or_compiled_keep_all_sums():
    (expected,) = train_all([case("pythia", 2, 1, tensor=2)], shares_norms=True).values()
    ways = [{"recomputing": recompute.Settings(mode)} for mode in ("selective", "full")]
    ways.append({"compiling": compiled.Settings(blocks=True, backend="aot_eager")})
    for way in ways:
        (of_ranks,) = train_all([case("pythia", 2, 1, tensor=2)], shares_norms=True, **way).values()
        assert_near(joined(of_ranks), joined(expected), 1e-12 if "recomputing" in way else 2e-6)


def test_norms_see_each_position_on_one_rank_only():
    def work(mesh):
        seen = []
        engine = tiny.start_engine(mesh, model=make("pythia"), shares_norms=True)
        for name, layer in engine._model.named_modules():
            if name.endswith("norm"):
                layer.register_forward_hook(lambda _, inputs, output: seen.append([*inputs[0].shape, *output.shape]))
        engine.score(tiny.windows_of_step(0))
        return seen

    shape = [8, tiny.LENGTH // 2, 24]
    assert on_ranks(2, work, tensor=2) == [[shape * 2] * 7] * 2  # two norms in each of three blocks, and the last one


def test_without_the_sum_of_their_gradients_copies_of_norms_would_differ(monkeypatch):
    monkeypatch.setattr("cpt.engine.engine.add_up_gradients", lambda model: None)

    def work(mesh):
        engine = tiny.start_engine(mesh, model=make("pythia"), shares_norms=True)
        tiny.take_steps(engine, mesh, 0, 2)
        return engine.differing_copies()

    (differing, _) = on_ranks(2, work, tensor=2)
    assert {"norm.weight", "blocks.0.attention_norm.bias", "blocks.1.mlp.down.bias"} <= set(differing)
