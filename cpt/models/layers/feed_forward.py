"""The gated feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from cpt_kernels import Kernels


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(self.kernels.swiglu(self.gate(hidden), self.up(hidden)))
