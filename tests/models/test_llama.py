"""Our Llama against transformers': logits, losses and every gradient, and what its settings promise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cpt.huggingface.architectures import llama as in_their_words
from cpt.models.llama import Model, Settings, decays
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

CPU = torch.device("cpu")
AUTO = KernelSettings()
KERNELS = {"auto": AUTO, "plain": KernelSettings(all="plain"), "chunked": KernelSettings(cross_entropy="chunked")}
ODD = Settings(
    vocabulary=131, width=48, layers=2, heads=6, kv_heads=2, mlp_width=88, rope_base=500.0, norm_epsilon=1e-4,
    initial_std=0.2, longest_sequence=64,
)  # fmt: skip
VARIANTS = {
    "grouped heads": ODD,
    "one head for all": dataclasses.replace(ODD, kv_heads=1),
    "as many heads": dataclasses.replace(ODD, kv_heads=None),
    "tied": dataclasses.replace(ODD, tied=True),
    "wide heads": dataclasses.replace(ODD, head_width=14),
}


def build(settings: Settings, kernels: KernelSettings = AUTO, seed: int = 1) -> Model:
    model = Model(settings, choose(kernels, CPU))
    model.initialise(seed)
    with torch.no_grad():  # norms of exactly 1 would hide a norm that is never applied
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def tokens_of(settings: Settings, windows: int = 3, positions: int = 37) -> torch.Tensor:
    return torch.randint(settings.vocabulary, (windows, positions + 1), generator=torch.Generator().manual_seed(2))


def their_twin(model: Model, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' Llama with the weights of ours, computing in `dtype`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**in_their_words.config_of(model.settings)))
    names = in_their_words.names(model.settings)
    state = {names[name]: parameter.detach() for name, parameter in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if model.settings.tied else [])
    theirs.to(dtype)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # `to` has rounded its angles
    return theirs


def our_results(model: Model) -> dict[str, torch.Tensor]:
    """Logits, losses and the gradient of every parameter."""
    window = tokens_of(model.settings)
    losses = model(window[:, :-1], window[:, 1:])
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": model(window[:, :-1]), "losses": losses, **gradients}


def their_results(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same of transformers' Llama, under our names."""
    theirs, window = their_twin(model, dtype), tokens_of(model.settings)
    logits = theirs(input_ids=window[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.float().mT, window[:, 1:], reduction="none")
    losses.mean().backward()
    gradients = {ours: theirs.get_parameter(name).grad for ours, name in in_their_words.names(model.settings).items()}
    return {"logits": logits, "losses": losses, **gradients}


def relative_errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of each, relative to its largest entry."""
    assert got.keys() == expected.keys()
    errors = {}
    for name, exact in expected.items():
        assert got[name].shape == exact.shape
        difference = got[name].detach().float() - exact.detach().float()
        errors[name] = (difference.abs().max() / exact.detach().abs().max()).item()
    return errors


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients_equal_those_of_transformers_in_fp32(variant, kernels):
    model = build(VARIANTS[variant], KERNELS[kernels])
    errors = relative_errors(our_results(model), their_results(model, torch.float32))
    assert max(errors.values()) < 1e-5, errors  # measured: up to 2.5e-6


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_we_are_as_close_to_fp32_as_transformers_is(variant, kernels):
    model = build(VARIANTS[variant], KERNELS[kernels]).bfloat16()
    exact = their_results(model, torch.float32)
    ours = relative_errors(our_results(model), exact)
    theirs = relative_errors(their_results(model, torch.bfloat16), exact)
    assert max(ours.values()) < 1.5 * max(theirs.values())  # measured: 0.6 to 1.2
    assert max(ours.values()) < 0.08, ours  # measured: up to 0.05
    assert ours["losses"] < 0.03, ours


def test_losses_are_fp32_under_bf16_weights():
    model = build(ODD).bfloat16()
    window = tokens_of(ODD)
    assert model(window[:, :-1], window[:, 1:]).dtype is torch.float32


def test_initial_weights_depend_on_seed_and_name_alone():
    model, again, other = build(ODD, seed=7), build(ODD, seed=7), build(ODD, seed=8)
    shallow = Model(dataclasses.replace(ODD, layers=1), choose(KernelSettings(), CPU))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if decays(name):
            assert not torch.equal(parameter, other.get_parameter(name))
    name = "blocks.0.attention.query.weight"
    assert torch.equal(shallow.initial_value(name, 7), model.initial_value(name, 7))


def test_initialising_leaves_the_random_numbers_of_the_run_alone():
    model = Model(ODD, choose(KernelSettings(), CPU))
    before = torch.get_rng_state()
    model.initialise(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_have_the_asked_spread():
    settings = Settings(vocabulary=500, width=96, layers=8, heads=4, initial_std=0.05)
    model = Model(settings, choose(KernelSettings(), CPU))
    model.initialise(0)
    small = 0.05 / math.sqrt(16)
    spreads = {"embedding.weight": 0.05, "blocks.3.attention.query.weight": 0.05, "blocks.3.mlp.up.weight": 0.05,
               "blocks.3.attention.output.weight": small, "blocks.3.mlp.down.weight": small}  # fmt: skip
    for name, spread in spreads.items():
        assert model.get_parameter(name).std().item() == pytest.approx(spread, rel=0.03), name
    assert torch.equal(model.get_parameter("blocks.3.mlp_norm.weight"), torch.ones(96))


@pytest.mark.parametrize("tied", [False, True])
def test_settings_know_every_parameter_and_its_shape(tied):
    settings = dataclasses.replace(ODD, tied=tied)
    model = build(settings)
    actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(actual.items()) == list(settings.shapes.items())
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_is_the_embedding_itself():
    model = build(dataclasses.replace(ODD, tied=True))
    assert model.head.weight is model.embedding.weight
    model.bfloat16()
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("tied", [False, True])
def test_floating_point_operations_are_those_of_an_8b_llama(tied):
    llama_8b = Settings(vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, tied=tied)
    assert llama_8b.num_parameters == (8_030_261_248 if not tied else 8_030_261_248 - 128256 * 4096)
    # The head multiplies whether it is tied or not. By hand: 6 x 7.505e9 + 6 x 32 x 4096 x 8192.
    assert llama_8b.flops_per_token(8192) == pytest.approx(51.47e9, rel=1e-3)


def test_only_norms_do_not_decay():
    assert {name for name in ODD.shapes if not decays(name)} == {
        "norm.weight",
        *(f"blocks.{block}.{norm}.weight" for block in (0, 1) for norm in ("attention_norm", "mlp_norm")),
    }


def test_no_token_sees_a_later_one():
    model = build(ODD)
    tokens = tokens_of(ODD)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % ODD.vocabulary
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:20] == 0).all() and (difference[20:] > 0).all()


def test_a_sequence_beyond_the_longest_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens is longer than model\.longest_sequence = 64"):
        build(ODD)(torch.zeros(1, 65, dtype=torch.int64))


def test_contradictory_settings_are_told_all_at_once():
    assert Settings(vocabulary=0, layers=-1).faults() == [
        "vocabulary = 0: must be more than 0",
        "layers = -1: must be more than 0",
    ]
    assert Settings(vocabulary=9, width=50, heads=4, kv_heads=3).faults() == [
        "width = 50: 4 heads cannot share it evenly; change it or set head_width",
        "kv_heads = 3: 4 heads cannot share them evenly; use 1, 2, 4",
    ]
    assert Settings(vocabulary=9, width=12, heads=4).faults() == [
        "width / heads = 3: rotary positions turn pairs of entries; make it even"
    ]
    assert Settings(vocabulary=9, width=12, heads=4, head_width=5).faults() == [
        "head_width = 5: rotary positions turn pairs of entries; make it even"
    ]
    assert ODD.faults() == []


def test_the_feed_forward_width_is_eight_thirds_in_multiples_of_64():
    assert Settings(vocabulary=9, width=256).width_of_mlp == 704
    assert Settings(vocabulary=9, width=384).width_of_mlp == 1024
