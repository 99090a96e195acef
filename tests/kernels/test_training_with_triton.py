"""Training through Triton's kernels, all of them at once, follows the same losses as through the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpt_harness.twins import DEVICES

from cpt.config import build
from cpt.models import llama, pythia
from cpt_kernels import Settings, choose
from cpt_kernels.documents import model_inputs

WORDS, LENGTH = 23, 20
_SMALL = {"vocabulary": WORDS, "width": 12, "layers": 1, "longest_sequence": LENGTH, "initial_std": 0.2}
MODELS = {
    "llama": llama.Settings(**_SMALL, heads=2, kv_heads=1, mlp_width=20),
    "pythia": pythia.Settings(**_SMALL, heads=2, mlp_width=20, has_parallel_residual=False),
}


def windows_of_step(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and starts, [1, LENGTH + 1]: documents that count on by a step of their own, with a slip now and then."""
    draws = torch.Generator().manual_seed(step)
    starts = torch.rand(1, LENGTH + 1, generator=draws) < 0.15
    strides = torch.randint(1, 3, (1, LENGTH + 1), generator=draws)
    slips = torch.rand(1, LENGTH + 1, generator=draws) < 0.05
    number = starts.cumsum(1)
    counted = (strides.gather(1, number) + slips).cumsum(1) + 7 * number
    return counted % WORDS, starts


def losses_of_training(model: Any, twins: str, device: torch.device, num_steps: int) -> torch.Tensor:
    """The mean loss of each step."""
    kernels = choose(Settings(all=twins), device)
    trained = build(model, "Model", kernels)
    trained.initialise(1)
    trained.to(device)
    optimizer = kernels.adamw([{"params": list(trained.parameters()), "weight_decay": 0.1}], 3e-3, (0.9, 0.95), 1e-8)
    losses = []
    for step in range(num_steps):
        inputs, targets, documents = model_inputs(*windows_of_step(step), device)
        of_tokens = trained(inputs, targets, documents)
        loss = of_tokens.sum() / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def assert_same_losses(model: Any, device: torch.device, num_steps: int) -> torch.Tensor:
    plain, ours = (losses_of_training(model, twins, device, num_steps) for twins in ("plain", "triton"))
    differences = (ours - plain).abs()
    # Rounding differs in the last bits of fp32, and training makes more of that with every step. In the interpreter the
    # largest difference of 200 steps was 7e-7; a GPU sums in another order.
    assert differences[:10].max() < 2e-6 * plain[0], differences[:10]
    assert differences.max() < (1e-5 if device.type == "cpu" else 1e-3) * plain[0], differences.max()
    return plain


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_four_steps_have_the_losses_of_the_plain_twins(device, name):
    assert_same_losses(MODELS[name], device, 4)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_200_steps_have_the_losses_of_the_plain_twins(device, name):
    plain = assert_same_losses(MODELS[name], device, 200)
    assert plain[-20:].mean() < 0.7 * plain[:20].mean()
