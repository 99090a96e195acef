"""Where are we? Everything in a run that depends on time is a pure function of this."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A place between two steps of a run; all counts begin at 0 and speak of what is behind us.

    `tokens` and `stage_tokens` count what all ranks trained on together, replayed tokens included; `step_tokens` those
    of the last step.
    """

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_tokens: int = 0
    step_tokens: int = 0

    def after_step(self, num_tokens: int) -> Progress:
        """The place after one more step that trained on `num_tokens`."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + num_tokens,
            stage_step=self.stage_step + 1,
            stage_tokens=self.stage_tokens + num_tokens,
            step_tokens=num_tokens,
        )

    def at_next_stage(self) -> Progress:
        """The same place, counted as the beginning of the next stage."""
        return dataclasses.replace(self, stage=self.stage + 1, stage_step=0, stage_tokens=0)

    def crosses(self, every_tokens: int | None) -> bool:
        """Whether the last step passed a multiple of `every_tokens`; never if that is None."""
        if every_tokens is None:
            return False
        return self.tokens // every_tokens > (self.tokens - self.step_tokens) // every_tokens
