"""Whether a run that begins from weights begins as the model that it was given, and does not jump away from it.

    before step 1    loss of a probe text = that of the model the weights come from
    after 1, 10      the same text, scored again: a jump means that the step did something else than learn

The jump is what fp32 masters that were never filled look like, rotary positions of another convention, or a learning
rate that is far too high; the first loss alone does not show the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger(__name__)

STEPS_TO_CHECK = (1, 10)


@dataclass(frozen=True)
class Settings:
    """`windows`: of the probe text, 0 for no gate. `tolerance`: how far, relative to it, the loss before step 1 may lie
    from that of the model the weights come from; rounding to bf16 takes about a thousandth. `largest_jump`: how far, in
    nats a token, it may rise by the steps 1 and 10.
    """

    windows: int = 4
    tolerance: float = 0.01
    largest_jump: float = 2.0

    def faults(self) -> list[str]:
        """Numbers below 0."""
        return [
            f"{name} = {value:g}: at least 0{'; 0 leaves the gate out' if name == 'windows' else ''}"
            for name, value in vars(self).items()
            if value < 0
        ]


class StartGate:
    """Holds losses before step 1 against what they should be, and the probe text's against what it is later.

    `score` gives the loss of the probe text with the weights of the moment, nats a token; it is called at once.
    """

    def __init__(self, settings: Settings, score: Callable[[], float]) -> None:
        self._settings, self._score = settings, score
        self._before = score()

    def fault_at_source(self, name: str, found: float, expected: float, origin: str) -> str | None:
        """What is wrong with the loss `found` of the text `name` where `origin` says `expected`; None if nothing is."""
        if abs(found - expected) <= self._settings.tolerance * abs(expected):
            _log.info("start: loss on %s %.4f, %s %.4f", name, found, origin, expected)
            return None
        return (
            f"before step 1 the loss on {name} is {found:.4f}, {origin} it is {expected:.4f} (gate.tolerance = "
            f"{self._settings.tolerance:g}): this run does not compute with the model that it was given. Look at "
            "precision, attention and the rotary settings; cpt convert verify compares two models"
        )

    def fault_after(self, step: int) -> str | None:
        """What is wrong with the loss of the probe text after that many steps; None if nothing is, or it is not due."""
        if step not in STEPS_TO_CHECK:
            return None
        loss = self._score()
        if loss - self._before <= self._settings.largest_jump:  # NaN is not
            return None
        return (
            f"after step {step} the loss on the probe text is {loss:.4f}, before step 1 it was {self._before:.4f} "
            f"(gate.largest_jump = {self._settings.largest_jump:g}): the steps destroy what the weights knew. Take a "
            "lower peak or a longer warm-up, or raise gate.largest_jump if it is meant to be so"
        )
