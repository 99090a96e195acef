"""What follows from the shape of a decoder: counts of weights and of floating-point operations."""

from __future__ import annotations

import math
from typing import Any


class Shape:
    """For `Settings` with `shapes`, `vocabulary`, `width`, `layers`, `heads`, `width_of_head` and `tied`."""

    @property
    def num_parameters(self) -> int:
        """All weights; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: all matrices, with the head and without the input embedding."""
        matrices = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) == 2)
        return matrices if self.tied else matrices - self.vocabulary * self.width

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 a weight, and causal attention.

        Causal: a position meets half of all positions on average, so attention costs 6 x layers x heads x K x S, half
        of what is often quoted.
        """
        attention_width = self.heads * self.width_of_head
        return 6.0 * self.num_matmul_parameters + 6.0 * self.layers * attention_width * sequence_length


def not_positive(settings: Any, names: tuple[str, ...]) -> list[str]:
    """A line for each of these settings that is told and not above 0."""
    told = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return [f"{name} = {value}: must be more than 0" for name, value in told.items() if value <= 0]


def with_biases(name: str, shape: tuple[int, ...], has_bias: bool) -> dict[str, tuple[int, ...]]:
    """The weight of a layer `name` and, where it has one, its bias: as long as the weight has rows."""
    bias = {f"{name}.bias": shape[:1]} if has_bias else {}
    return {f"{name}.weight": shape, **bias}
