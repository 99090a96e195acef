"""A model that takes up new tokens: old logits stay, new rows begin near what they replace and outweigh nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from cpt.config import Fault, build, read_settings
from cpt.models import llama, pythia
from cpt.models.growth import GrownWeights, Growth, grown_rows
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

NUM_OLD, NUM_ROWS, WIDTH = 61, 64, 24  # three rows of padding
PIECES = [[3, 5], [7], [], [1, 2, 60, 4], [5, 5, 5]]
LLAMA = llama.Settings(vocabulary=NUM_ROWS, width=WIDTH, layers=2, heads=3, kv_heads=1, mlp_width=40, initial_std=0.3)
PYTHIA = pythia.Settings(vocabulary=NUM_ROWS, width=WIDTH, layers=2, heads=3, rotary_share=0.5, initial_std=0.3)
MODELS = {
    "llama": LLAMA,
    "tied llama": replace(LLAMA, tied=True),
    "pythia": PYTHIA,
    "tied pythia": replace(PYTHIA, tied=True),
}
INITS = ("mean_of_pieces", "mean_and_covariance")


def old_rows(number: int = NUM_OLD, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype) + 0.5


def old_and_new(settings, init="mean_of_pieces", seed=1):
    """A model with random weights, and the one that it grows into."""
    old = build(settings, "Model", choose(KernelSettings(), torch.device("cpu")))
    old.initialise(4)
    weights = {name: parameter.detach() for name, parameter in old.named_parameters()}
    grown = GrownWeights(weights, init, PIECES, NUM_OLD, seed, num_rows=NUM_ROWS)
    new = build(replace(settings, vocabulary=grown.vocabulary), "Model", old.head.kernels)
    new.load_state_dict({name: grown[name] for name in grown}, strict=not settings.tied)
    return old, new, grown


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_old_rows_stay_bit_for_bit(init, dtype):
    rows = old_rows(dtype=dtype)
    grown = grown_rows(rows, PIECES, init, 1, rescaled=True)
    assert grown.shape == (NUM_OLD + len(PIECES), WIDTH) and grown.dtype == torch.float32
    assert torch.equal(grown[:NUM_OLD].to(dtype), rows)
    assert grown.isfinite().all()


def test_a_row_is_the_mean_of_the_rows_of_its_pieces_else_of_all():
    rows = old_rows()
    new = grown_rows(rows, PIECES, "mean_of_pieces", 1)[NUM_OLD:]
    assert torch.allclose(new[0], (rows[3] + rows[5]) / 2)
    assert torch.equal(new[1], rows[7])
    assert torch.allclose(new[2], rows.mean(dim=0))
    assert torch.allclose(new[3], rows[[1, 2, 60, 4]].mean(dim=0))
    assert torch.allclose(new[4], rows[5])


def test_a_rescaled_row_points_the_same_way_and_has_the_median_length():
    rows = old_rows()
    rows[7] = 0
    plain, rescaled = (
        grown_rows(rows, PIECES, "mean_of_pieces", 1, rescaled=r)[NUM_OLD:][[0, 2, 3, 4]] for r in (False, True)
    )
    assert torch.allclose(functional.cosine_similarity(plain, rescaled), torch.ones(4))
    assert torch.allclose(rescaled.norm(dim=1), rows.norm(dim=1).median().expand(4))
    assert not grown_rows(rows, [[7]], "mean_of_pieces", 1, rescaled=True)[NUM_OLD:].any()


def test_draws_have_the_mean_of_the_old_rows_and_a_billionth_of_their_covariance():
    rows = old_rows(400)
    rows[:, 1] = 3 * rows[:, 0]
    new = grown_rows(rows, [[]] * 4000, "mean_and_covariance", 1)[400:].double()
    covariance = torch.cov(rows.double().T, correction=0)
    error = torch.cov((new - rows.double().mean(dim=0)).T * 1e9**0.5, correction=0) - covariance
    assert error.abs().max() < 0.1 * covariance.abs().max()
    assert (new.mean(dim=0) - rows.double().mean(dim=0)).abs().max() < 1e-5


def test_draws_depend_on_the_seed_alone_and_few_or_equal_rows_will_do():
    draws = [grown_rows(old_rows(), PIECES, "mean_and_covariance", seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    few = grown_rows(old_rows(3), PIECES, "mean_and_covariance", 1)
    same = grown_rows(torch.ones(5, WIDTH), PIECES, "mean_and_covariance", 1)
    assert few.isfinite().all() and torch.allclose(same, torch.ones(()))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_old_tokens_stay_bit_for_bit(name, init):
    old, new, grown = old_and_new(MODELS[name], init)
    tokens = torch.randint(NUM_OLD, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = old(tokens), new(tokens)
    assert after.shape[-1] == grown.vocabulary == NUM_OLD + len(PIECES)
    assert torch.equal(after[..., :NUM_OLD], before[..., :NUM_OLD])
    assert all(torch.equal(grown[name], dict(old.named_parameters())[name]) for name in grown if ".blocks" in name)


@pytest.mark.parametrize("name", MODELS)
def test_bits_per_byte_of_a_text_in_old_tokens_change_by_no_more_than_the_new_tokens_can_take(name):
    old, new, _ = old_and_new(MODELS[name])
    tokens = torch.randint(NUM_OLD, (4, 12), generator=torch.Generator().manual_seed(2))
    num_bytes = 3 * tokens[:, 1:].numel()

    def bits_per_byte(model, num_tokens=None):
        with torch.no_grad():
            logits = model(tokens[:, :-1])[..., :num_tokens]
        losses = functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="sum")
        return losses.item() / math.log(2) / num_bytes

    before = bits_per_byte(old, NUM_OLD)
    assert bits_per_byte(new, NUM_OLD) == before
    # A new token is never likelier than its pieces on average.
    with torch.no_grad():
        probabilities = old(tokens[:, :-1])[..., :NUM_OLD].softmax(dim=-1)
    spelled = [probabilities[..., ids or list(range(NUM_OLD))].mean(dim=-1) for ids in PIECES]
    at_most = torch.stack(spelled).sum(dim=0).log1p().sum().item() / math.log(2) / num_bytes
    assert before < bits_per_byte(new) <= before + at_most + 1e-6


def test_input_and_output_have_new_rows_of_their_own_and_a_tied_matrix_plain_means():
    old, _, grown = old_and_new(LLAMA)
    weights = dict(old.named_parameters())
    lengths = weights["embedding.weight"][:NUM_OLD].norm(dim=1)
    assert torch.allclose(grown["embedding.weight"][NUM_OLD:].norm(dim=1), lengths.median().expand(len(PIECES)))
    expected = grown_rows(weights["head.weight"][:NUM_OLD].detach(), PIECES, "mean_of_pieces", 1)
    assert torch.equal(grown["head.weight"], expected)
    tied, _, grown = old_and_new(MODELS["tied llama"])
    expected = grown_rows(tied.embedding.weight[:NUM_OLD].detach(), PIECES, "mean_of_pieces", 1)
    assert torch.equal(grown["embedding.weight"], expected)
    assert "head.weight" not in grown
    _, _, drawn = old_and_new(LLAMA, "mean_and_covariance")
    noise = [drawn[n][NUM_OLD:] - weights[n][:NUM_OLD].mean(dim=0) for n in ("embedding.weight", "head.weight")]
    assert not torch.allclose(noise[0], noise[1])


def test_the_weights_are_listed_as_before_and_only_two_are_grown():
    old, _, grown = old_and_new(LLAMA)
    assert list(grown) == [name for name, _ in old.named_parameters()] and len(grown) == len(list(grown))
    assert [name for name in grown if grown.is_grown(name)] == ["embedding.weight", "head.weight"]


def test_a_tokenizer_with_more_entries_than_the_weights_have_rows_is_refused():
    with pytest.raises(Fault, match="the weights have rows for 60 tokens, their tokenizer has 61 entries: it is of"):
        GrownWeights({}, "mean_of_pieces", PIECES, NUM_OLD, 1, num_rows=60)


def test_settings_are_read_and_a_count_below_nothing_is_a_fault():
    growth = read_settings(Growth, {"grow_to": "t", "init": "mean_and_covariance", "train_new_rows_first": "2M"})
    assert (growth.init, growth.train_new_rows_first) == ("mean_and_covariance", 2_000_000)
    with pytest.raises(Fault, match="train_new_rows_first = -1: a number of tokens; 0 trains all from the start"):
        read_settings(Growth, {"grow_to": "t", "train_new_rows_first": -1})
    with pytest.raises(Fault, match="init = 'zeros'"):
        read_settings(Growth, {"grow_to": "t", "init": "zeros"})
