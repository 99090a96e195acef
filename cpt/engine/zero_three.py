"""Weights that are cut over the replicas before DeepSpeed sees them, so that no device ever holds a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cpt.parallel.mesh import Mesh

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cut_weights(model: nn.Module, made: dict[str, Any], mesh: Mesh, precision: str) -> None:
    """Leave of each parameter of `model`, one after the other, this rank's share on its device; ZeRO stage 3 only.

    `made`: what `deepspeed.initialize` is given. Left to itself it moves the whole model to each device first.
    """
    import deepspeed

    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False, dist_init_required=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_TYPES[precision])
    group = mesh.same_parameters.handle
    deepspeed.zero.Init(module=model, config_dict_or_path=made, data_parallel_group=group, dtype=_TYPES[precision])
