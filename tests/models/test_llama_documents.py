"""In a window of several documents the model treats each as if it stood alone; without them nothing has changed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cpt.config import as_mapping
from cpt.models.llama import Model, Settings
from cpt_kernels import Documents, choose
from cpt_kernels import Settings as KernelSettings
from cpt_kernels.documents import model_inputs

CPU = torch.device("cpu")
KERNELS = {"auto": KernelSettings(), "plain": KernelSettings(all="plain"), "torch": KernelSettings(attention="torch")}
SETTINGS = Settings(
    vocabulary=61, width=48, layers=2, heads=6, kv_heads=2, mlp_width=88, rope_base=500.0, initial_std=0.2,
    longest_sequence=64,
)  # fmt: skip
LENGTHS = [[17, 1, 19], [37], [1] * 37, [30, 7]]


def build(kernels: str) -> Model:
    model = Model(SETTINGS, choose(KERNELS[kernels], CPU))
    model.initialise(3)
    return model


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and starts, [4, 38]: the windows of LENGTHS, and one token more."""
    tokens = torch.randint(61, (4, 38), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(4, 38, dtype=torch.bool)
    for window, lengths in enumerate(LENGTHS):
        starts[window, torch.tensor([0, *lengths]).cumsum(0)] = True
    return tokens, starts


def documents_alone(tokens: torch.Tensor) -> list[torch.Tensor]:
    return [part[None] for window, lengths in zip(tokens, LENGTHS, strict=True) for part in window[:37].split(lengths)]


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("parts", ["as measured", "always"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_losses_and_gradients_are_those_of_each_document_alone(kernels, parts, monkeypatch):
    if parts == "always":
        monkeypatch.setattr("cpt_kernels.attention._SCORES_IN_THE_TIME_OF_A_CALL", -1)
    model, (tokens, starts) = build(kernels), packed()
    inputs, targets, documents = model_inputs(tokens, starts, CPU)
    alone = [model(document)[0] for document in documents_alone(tokens)]
    assert torch.allclose(model(inputs, documents=documents).flatten(0, 1), torch.cat(alone), atol=2e-5)
    losses = model(inputs, targets, documents)
    of_documents = [
        model(document[:, :-1], document[:, 1:]).sum() for document in documents_alone(tokens) if document.shape[1] > 1
    ]
    mine, theirs = gradients(model, losses.sum()), gradients(model, torch.stack(of_documents).sum())
    assert losses.sum().item() == pytest.approx(torch.stack(of_documents).sum().item(), rel=1e-6)
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
    assert not losses[starts[:, 1:]].any()


def test_across_documents_the_logits_would_be_others():
    model, (tokens, starts) = build("auto"), packed()
    across = model(tokens[:, :-1])
    within = model(tokens[:, :-1], documents=Documents.from_starts(starts[:, :-1]))
    assert torch.allclose(across[1], within[1], atol=1e-5)  # one document
    assert (across[0, 18:] - within[0, 18:]).abs().max() > 0.1


def test_positions_begin_again_in_each_document():
    """Only differences of positions reach the logits, so that these would not tell."""
    kernels, seen = choose(KernelSettings(), CPU), []
    watched = dataclasses.replace(
        kernels, rotary=lambda q, k, angles: (seen.append(angles), kernels.rotary(q, k, angles))[1]
    )
    model = Model(SETTINGS, watched)
    model.initialise(3)
    tokens, starts = packed()
    whole, within = model_inputs(tokens, None, CPU), model_inputs(tokens, starts, CPU)
    model(*whole)
    model(*within)
    table, gathered = seen[0], seen[-1]
    assert table.shape == (2, 37, 4) and gathered.shape == (2, 4, 37, 4)
    for window, lengths in enumerate(LENGTHS):
        for document in gathered[:, window].split(lengths, dim=1):
            assert torch.equal(document, table[:, : document.shape[1]])


@pytest.mark.parametrize("kernels", KERNELS)
def test_windows_of_one_document_have_the_same_bits_as_without_documents(kernels):
    model, (tokens, _) = build(kernels), packed()
    documents = Documents.from_starts(torch.zeros(4, 37, dtype=torch.bool))
    without, within = (model(tokens[:, :-1], tokens[:, 1:], given) for given in (None, documents))
    assert torch.equal(without, within)
    mine, theirs = gradients(model, within.mean()), gradients(model, without.mean())
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_family_says_how_it_was_trained_and_a_run_does_not_write_it_down():
    assert Settings.attends_across_documents is False and SETTINGS.attends_across_documents is False
    assert "attends_across_documents" not in {field.name for field in dataclasses.fields(SETTINGS)}
    assert "attends_across_documents" not in as_mapping(SETTINGS)
