"""A model that is built on no memory and given some trains as one that was built with its weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpt_harness import parity, ranks, tiny

from cpt.config import build
from cpt_kernels import Settings, choose

CPU = torch.device("cpu")
TIED = dataclasses.replace(parity.PYTHIAS["tied"], vocabulary=tiny.LLAMA.vocabulary)


def built() -> torch.nn.Module:
    return build(TIED, "Model", choose(Settings(), CPU))


def built_on_no_memory() -> torch.nn.Module:
    with torch.device("meta"):
        model = built()
    model.materialise(CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what may lie in new memory
    return model


@pytest.mark.parametrize("zero", [1, 3])
def test_the_losses_are_the_same(zero):
    def losses(mesh, how) -> list[float]:
        engine = tiny.start_engine(mesh, zero=zero, model=how)
        return [result.loss for result in tiny.take_steps(engine, mesh, 0, 3)]

    def both(mesh) -> list[list[float]]:
        return [losses(mesh, built), losses(mesh, built_on_no_memory)]

    usual, late = ranks.on_ranks(2, both)[0]
    assert usual == late and usual[-1] < usual[0]


def test_at_stage_3_no_device_is_ever_given_a_whole_parameter(monkeypatch):
    """DeepSpeed moves what it is given to the device before it cuts it, so it is given what is cut already."""

    def work(mesh):
        import deepspeed

        found = []
        initialize = deepspeed.initialize

        def look(**named):
            parameters = list(named["model"].parameters())
            found.extend(p.numel() == 0 and p.ds_tensor.numel() <= -(-p.ds_numel // mesh.size) for p in parameters)
            return initialize(**named)

        monkeypatch.setattr(deepspeed, "initialize", look)
        for precision in ("fp32", "bf16"):
            tiny.start_engine(mesh, zero=3, precision=precision, model=built)
        return found

    for found in ranks.on_ranks(2, work):
        assert len(found) == 2 * len(list(built().parameters())) and all(found)
