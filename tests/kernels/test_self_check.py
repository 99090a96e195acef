"""What a twin is asked on the device where it is to serve: the kernels pass, and whatever is wrong is told."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.twins import CPU, DEVICES

from cpt_kernels import adamw, cross_entropy, gelu, layer_norm, rms_norm, swiglu
from cpt_kernels.self_check import difference


@pytest.mark.parametrize("operation", [rms_norm, layer_norm, swiglu, gelu, cross_entropy, adamw])
@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_passes(operation, device):
    assert operation.check(device) is None


@pytest.mark.parametrize(
    ("serving", "told"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2.1 * x, "output in float32 is off by 5.0e-02 of its largest entry"),
        (lambda x: 2 * x * torch.nan, "output in float32 is off by nan of its largest entry"),
        (lambda x: 3 * x.detach() - x, "gradient of input 0 in float32 is off by "),
        (lambda x: torch.ones_like(x).requires_grad_() * 2 * x.detach(), "gradient of input 0 is missing"),
    ],
)
def test_what_is_wrong_is_told(serving, told):
    found = difference(serving, lambda x: 2 * x, [(5, 3)], torch.float32, CPU)
    assert found is None if told is None else found.startswith(told)
