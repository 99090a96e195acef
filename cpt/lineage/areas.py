"""What learning rates add up to: the two areas that scaling laws of continual pre-training are fitted on.

    S1 = sum over steps i of rate(i)                                                        forward area
    S2 = sum over i of the sum over k <= i of (rate(k - 1) - rate(k)) x 0.999^(i - k)       annealing area

Each step adds to both in constant time: the inner sum is a number that decays.
Source: Wang et al. 2025, arXiv:2505.07796; Tissue et al. 2024, arXiv:2408.11029.
"""

from __future__ import annotations

from dataclasses import dataclass

_DECAY = 0.999


@dataclass(frozen=True)
class Areas:
    """`forward` S1 and `annealing` S2 of the steps so far; `falling`, the inner sum of S2; `rate` of the last step.

    Before the first step `rate` is that of the parent's last; None if there is none: a first step falls from nowhere.
    """

    forward: float = 0.0
    annealing: float = 0.0
    falling: float = 0.0
    rate: float | None = None

    def after_step(self, rate: float) -> Areas:
        """The areas after one more step at this learning rate."""
        fall = 0.0 if self.rate is None else self.rate - rate
        falling = _DECAY * self.falling + fall
        return Areas(self.forward + rate, self.annealing + falling, falling, rate)
