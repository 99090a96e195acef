"""The mesh in the words that DeepSpeed asks with: its `mpu`, a "model parallel unit"."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from cpt.parallel.mesh import Mesh
from cpt.parallel.parts import parts_of


class ModelParallelUnit:
    """With it ZeRO cuts over those with the same parameters only, and gradient norms are summed over tensor ranks too.

    DeepSpeed keeps the unit that it was given last for the whole process.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        """Place among those that share a layer."""
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """How many share a layer."""
        return self._mesh.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Those that share a layer."""
        return self._mesh.tensor.handle

    # Newer parts of DeepSpeed ask for the same as Megatron does.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Place among those that hold the same parameters."""
        return self._mesh.same_parameters.rank

    def get_data_parallel_world_size(self) -> int:
        """How many hold the same parameters."""
        return self._mesh.same_parameters.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Those that hold the same parameters."""
        return self._mesh.same_parameters.handle


def mark_parts(model: nn.Module) -> None:
    """Tell DeepSpeed which gradients count in the norm on ranks other than a tensor group's first.

    Without the mark it takes the first rank's norm for that of all, and clips by it. What several ranks hold alike is
    marked on the first of them only.
    """
    for name, part in parts_of(model).items():
        model.get_parameter(name).tensor_model_parallel = part.is_first_copy


def is_counted(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this rank adds a parameter's gradient to the norm of all: the rule that DeepSpeed follows."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return mesh.tensor.rank == 0 or getattr(parameter, "tensor_model_parallel", False)
