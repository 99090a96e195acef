"""Feed-forward layers: gated, as Llama has it, and without a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from cpt_kernels import Kernels

Activation = Literal["gelu", "gelu_tanh", "silu"]


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int, kernels: Kernels, has_bias: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate = nn.Linear(width, mlp_width, bias=has_bias)
        self.up = nn.Linear(width, mlp_width, bias=has_bias)
        self.down = nn.Linear(mlp_width, width, bias=has_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(self.kernels.swiglu(self.gate(hidden), self.up(hidden)))


class UngatedFeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, width: int, mlp_width: int, activation: Activation, kernels: Kernels, has_bias: bool) -> None:
        super().__init__()
        self.activate = _function(activation, kernels)
        self.up = nn.Linear(width, mlp_width, bias=has_bias)
        self.down = nn.Linear(mlp_width, width, bias=has_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(self.activate(self.up(hidden)))


def _function(activation: Activation, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    functions = {"gelu": kernels.gelu, "gelu_tanh": partial(kernels.gelu, is_tanh=True), "silu": functional.silu}
    return functions[activation]
