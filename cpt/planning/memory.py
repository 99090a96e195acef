"""Bytes that a run's model state takes on each rank under ZeRO, exactly; activations are not counted.

Source: Rajbhandari et al. 2020, arXiv:1910.02054 (what each ZeRO stage cuts over the ranks).
"""

from __future__ import annotations

from dataclasses import dataclass

_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 value, first and second moment
_FP32 = 4


@dataclass(frozen=True)
class ModelState:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    methods: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.methods


def model_state(
    num_parameters: int, precision: str, zero: int, num_ranks: int, num_copies: int = 0, num_whole_copies: int = 0
) -> ModelState:
    """What one of `num_ranks` holds at ZeRO stage `zero`.

    Methods keep `num_copies` in fp32, cut as the masters are, and `num_whole_copies` in the model's precision. At stage
    0 the fp32 weights are the masters themselves. Gradients are accumulated in fp32.
    """
    low = 4 if precision == "fp32" else 2
    first_cut_at = {"optimizer": 1, "gradients": 2, "weights": 3}
    cut = {part: num_ranks if zero >= stage else 1 for part, stage in first_cut_at.items()}
    optimizer = _MASTER_AND_MOMENTS - (_FP32 if zero == 0 else 0)
    return ModelState(
        weights=num_parameters * low / cut["weights"],
        gradients=num_parameters * _FP32 / cut["gradients"],
        optimizer=num_parameters * optimizer / cut["optimizer"],
        methods=num_parameters * (_FP32 * num_copies / cut["optimizer"] + low * num_whole_copies),
    )
