"""While new rows learn alone nothing else moves, at any ZeRO stage; afterwards all learn as if the run began there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import tiny
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint
from cpt.config import Fault, read_settings
from cpt.methods import new_rows_first
from cpt.models import llama
from cpt.progress import Progress
from cpt_kernels import Settings, choose

FIRST_ROW = 37  # odd, so that new rows begin in the midst of a rank's piece
TOKENS_A_STEP = 8 * tiny.LENGTH
LAYOUTS = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
KINDS = (None, "exp_avg", "exp_avg_sq")
NEW_ROWS = ("embedding.weight", "head.weight")


def method(num_steps: int) -> new_rows_first.Method:
    return new_rows_first.Method(new_rows_first.Settings(num_steps * TOKENS_A_STEP, FIRST_ROW))


def take_steps(engine, mesh, first: int, last: int) -> list[tuple[float, float]]:
    """As `tiny.take_steps`, with progress counted in tokens too."""
    results, here = [], 8 // mesh.data_size
    for step in range(first, last):
        mine = tiny.windows_of_step(step)[mesh.data_rank * here : (mesh.data_rank + 1) * here]
        progress = Progress(step=step, tokens=step * TOKENS_A_STEP)
        result = engine.step(mine, torch.zeros(here, dtype=torch.long), 1, tiny.rate_of_step(step), progress)
        results.append((result.loss, result.grad_norm))
    return results


def split(whole: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what waits, what learns) of all parameters."""
    waits = {name: tensor[:FIRST_ROW] if name in NEW_ROWS else tensor for name, tensor in whole.items()}
    return waits, {name: whole[name][FIRST_ROW:] for name in NEW_ROWS}


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_new_rows_learn_at_first_and_nothing_else_moves_by_a_bit(ranks):
    def work(mesh):
        told = []
        for zero, precision in LAYOUTS:
            engine = tiny.start_engine(mesh, zero=zero, precision=precision, micro_batch=2, methods=[method(3)])
            begun = tiny.fragments(engine)
            losses = take_steps(engine, mesh, 0, 3)
            stale = list(engine.masters.stale())
            told.append((begun, [tiny.fragments(engine, kind) for kind in KINDS], losses, stale))
        return told

    for of_ranks in zip(*on_ranks(ranks, work), strict=True):
        begun = tiny.join([told[0] for told in of_ranks])
        masters, *moments = (tiny.join([told[1][number] for told in of_ranks]) for number in range(3))
        waited, _ = split(begun)
        for name, tensor in split(masters)[0].items():
            assert torch.equal(tensor, waited[name]), name
        for moment in moments:
            assert not any(tensor.any() for tensor in split(moment)[0].values())
            assert all(tensor.any() for tensor in split(moment)[1].values())
        for name, tensor in split(masters)[1].items():
            assert (tensor != begun[name][FIRST_ROW:]).float().mean() > 0.9, name
        assert of_ranks[0][3] == []
        assert of_ranks[0][2][2][0] < of_ranks[0][2][0][0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_afterwards_all_learn_as_in_a_run_that_begins_with_the_rows_learned_so_far(zero):
    def work(mesh):
        engine = tiny.start_engine(mesh, zero=zero, methods=[method(3)])
        take_steps(engine, mesh, 0, 3)
        learned = tiny.join([tiny.fragments(engine)])
        results = take_steps(engine, mesh, 3, 6)
        fresh = tiny.start_engine(mesh, zero=zero, fill=False)
        fresh.fill(lambda name, start, stop: learned[name].reshape(-1)[start:stop])
        same = take_steps(fresh, mesh, 3, 6)
        return results, same, tiny.fragments(engine), tiny.fragments(fresh)

    [(results, same, fragments, same_fragments)] = on_ranks(1, work)
    assert results == same
    assert all(torch.equal(a[3], b[3]) for a, b in zip(fragments, same_fragments, strict=True))


@pytest.mark.parametrize("left_at", [2, 3])
def test_a_run_taken_up_in_between_on_another_mesh_and_stage_goes_on_the_same(tmp_path, left_at):
    def leave(mesh):
        engine = tiny.start_engine(mesh, zero=1, methods=[method(3)])
        take_steps(engine, mesh, 0, left_at)
        engine.save(tmp_path / "left", {})
        take_steps(engine, mesh, left_at, 6)
        return tiny.fragments(engine)

    def go_on(mesh):
        engine = tiny.start_engine(mesh, zero=3, methods=[method(3)], fill=False)
        engine.load(Checkpoint(tmp_path / "left"), with_optimizer=True, with_methods=True)
        take_steps(engine, mesh, left_at, 6)
        return tiny.fragments(engine)

    whole = tiny.join(on_ranks(2, leave))
    taken_up = tiny.join(on_ranks(1, go_on))
    for name, tensor in whole.items():
        assert torch.allclose(taken_up[name], tensor, rtol=0, atol=2e-6), name


def test_warm_moments_wait_too_and_their_count_comes_back():
    def work(mesh):
        engine = tiny.start_engine(mesh, zero=1, methods=[method(2)])
        for step in range(4):
            engine.warm(tiny.windows_of_step(step), torch.zeros(8, dtype=torch.long))
        warm = tiny.fragments(engine, "exp_avg_sq")
        take_steps(engine, mesh, 0, 2)
        learned = tiny.fragments(engine, "exp_avg_sq")
        num_updates = engine.masters.num_updates
        take_steps(engine, mesh, 2, 3)
        return warm, learned, num_updates, engine.masters.num_updates

    [(warm, learned, num_updates, afterwards)] = on_ranks(1, work)
    (waits, new), (waits_still, new_learned) = split(tiny.join([warm])), split(tiny.join([learned]))
    assert all(torch.equal(waits[name], waits_still[name]) and waits[name].any() for name in waits)
    assert not any(torch.equal(new[name], new_learned[name]) for name in new)
    assert (num_updates, afterwards) == (6, 5)


@pytest.mark.parametrize("setting", ["tokens", "first_row"])
def test_counts_below_nothing_are_faults(setting):
    with pytest.raises(Fault, match=f"{setting} = -1: at least 0"):
        read_settings(new_rows_first.Settings, {setting: -1})


def test_on_tensor_ranks_it_is_what_it_is_on_one():
    settings = dataclasses.replace(tiny.LLAMA, heads=4, kv_heads=2, head_width=6)

    def work(mesh):
        told = []
        for zero in (0, 1, 3):
            model = llama.Model(settings, choose(Settings(), torch.device("cpu")))
            engine = tiny.start_engine(mesh, zero=zero, model=lambda model=model: model, methods=[method(3)])
            losses = take_steps(engine, mesh, 0, 5)
            told.append((losses, tiny.fragments(engine)))
        return told

    alone = on_ranks(1, work)[0]
    for (losses, fragments), *of_ranks in zip(alone, *on_ranks(2, work, tensor=2), strict=True):
        expected = tiny.join([fragments])
        assert torch.tensor(of_ranks[0][0]).sub(torch.tensor(losses)).abs().max() < 5e-6
        for name, values in tiny.join([one[1] for one in of_ranks]).items():
            assert (values - expected[name]).abs().max() < 1e-5, name
