"""When a step is bad, and what the settings say about it: numbers that are not finite, a loss far above the last ones.

    forward, backward --> judged --fine--> update, next step
                             | bad, and its windows are put down (autopsy.py)
                             +-- stop        the run ends; the checkpoint before it is whole
                             +-- skip_step   the update is left out; on with the next windows
                             +-- rewind      back to the checkpoint before it; what is bad is passed over on the way
                                             (rewinding.py)

The judgement is a function of the step's loss, its gradients and the losses in `metrics.jsonl`, so it is the same after
a stop. Sources: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (PaLM went back about 100 steps before a spike and
passed over 200 to 500 batches); Zhang et al. 2022, arXiv:2205.01068, section 2.5 (OPT).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpt.lineage.ledger import Skipped
from cpt.observe.records import read_records
from cpt.parallel.mesh import Mesh

_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


@dataclass(frozen=True)
class Settings:
    """What to do about a step whose loss or gradient is not finite, and about one whose loss is a spike.

    A spike stands above the median of the losses of the last `spike_steps` steps by more than `spike_nats`, and by more
    than so many `spike_deviations` (1.4826 times the median distance from the median: the standard deviation where
    there are no outliers); who names one of the two asks for that one. Of the stage and of those that were trained on:
    until there are so many, nothing is a spike.
    `skip_before`: as many steps before the bad one that a rewind passes over too, as far as the stage and the
    checkpoints go back. `at_most`: so many bad steps of this run, or of its last `within_steps`; with one more it ends.
    """

    nonfinite: Literal["stop", "skip_step", "rewind"] = "stop"
    spike: Literal["off", "stop", "skip_step", "rewind"] = "off"
    spike_steps: int = 50
    spike_nats: float | None = None
    spike_deviations: float | None = None
    skip_before: int = 0
    at_most: int = 10
    within_steps: int | None = None

    def faults(self) -> list[str]:
        """A spike that nobody can know, limits of nothing, settings that would have no effect."""
        named = {"spike_nats": self.spike_nats, "spike_deviations": self.spike_deviations}
        faults = [
            f"{name} = {value:g}: above 0, and a number"
            for name, value in named.items()
            if value is not None and not (value > 0 and math.isfinite(value))
        ]
        asked = [name for name, value in named.items() if value is not None]
        if self.spike != "off" and not asked:
            faults.append(
                f"spike = {self.spike}: say how far above the last losses a spike stands, such as spike_nats: 1.0 or "
                "spike_deviations: 10"
            )
        if self.spike == "off":
            faults.extend(f"{name} with spike = off: nothing looks at it; set spike, or leave it out" for name in asked)
        if self.spike_steps < 3:
            faults.append(f"spike_steps = {self.spike_steps}: at least 3, to have a median and distances from it")
        if self.skip_before < 0:
            faults.append(f"skip_before = {self.skip_before}: at least 0")
        if self.skip_before > 0 and not self.can_rewind:
            faults.append(
                f"skip_before = {self.skip_before}: only a rewind comes again to what lies before the bad step; set "
                "nonfinite or spike to rewind, or leave it out"
            )
        if self.at_most < 1:
            faults.append(f"at_most = {self.at_most}: at least 1; the policy stop ends a run at the first")
        if self.within_steps is not None and self.within_steps < 1:
            faults.append(f"within_steps = {self.within_steps}: at least 1; leave it out for the whole run")
        return faults

    @property
    def can_rewind(self) -> bool:
        """Whether anything makes a run go back."""
        return "rewind" in (self.nonfinite, self.spike)

    @property
    def goes_on(self) -> bool:
        """Whether a run may go on after a bad step, whose update must then be left out."""
        return self.can_rewind or "skip_step" in (self.nonfinite, self.spike)


@dataclass(frozen=True)
class Bad:
    """A bad step: what is to be done about it, and why it is one."""

    policy: str
    reason: str


class Judge:
    """Judges the steps of a run, alike on all ranks. `metrics`: its `metrics.jsonl`, which the first rank reads."""

    def __init__(self, settings: Settings, mesh: Mesh, metrics: Path) -> None:
        self._settings, self._mesh, self._metrics = settings, mesh, metrics
        self._losses: deque[float] = deque(maxlen=settings.spike_steps)

    def recall(self, stage: str) -> None:
        """Know the losses of the stage's last steps, from the lines that stand; collective."""
        if self._settings.spike == "off":
            return
        told = ""
        if self._mesh.is_first and self._metrics.is_file():
            told = json.dumps(losses_of(read_records(self._metrics), stage)[-self._settings.spike_steps :])
        told = self._mesh.texts(told)[0]
        self._losses = deque(json.loads(told) if told else (), maxlen=self._settings.spike_steps)

    def learn(self, loss: float) -> None:
        """Know the loss of a step that was trained on."""
        self._losses.append(loss)

    @property
    def before_update(self) -> Callable[[float, float], bool] | None:
        """Whether a step is bad, from its loss and the norm of its gradients; None if no update is ever left out."""
        if not self._settings.goes_on:
            return None
        return lambda loss, norm: self.found(loss, norm) is not None

    def found(self, loss: float, norm: float, was_left_out: bool = False) -> Bad | None:
        """What is bad about a step; None if nothing is. `was_left_out`: its update was, because of its gradients."""
        if was_left_out and math.isfinite(norm) and not self._above(loss):
            norm = math.inf
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Bad(self._settings.nonfinite, f"loss {loss}, gradient norm {norm}: not finite")
        if above := self._above(loss):
            return Bad(self._settings.spike, above)
        return None

    def _above(self, loss: float) -> str:
        """Why a loss is a spike; nothing if it is none."""
        settings = self._settings
        if settings.spike == "off" or len(self._losses) < settings.spike_steps or not math.isfinite(loss):
            return ""
        median, deviation = center_and_deviation(self._losses)
        margin = max(settings.spike_nats or 0.0, (settings.spike_deviations or 0.0) * deviation)
        if loss <= median + margin:
            return ""
        return (
            f"loss {loss:.4f} is a spike: {loss - median:.4f} above {median:.4f}, the median of the last "
            f"{settings.spike_steps} steps, of which {margin:.4f} are allowed"
        )


def losses_of(records: Iterable[dict[str, Any]], stage: str) -> list[float]:
    """The losses of a stage's steps that were trained on, from the objects of `metrics.jsonl`."""
    return [line["loss"] for line in records if line["stage"] == stage and not line.get("skipped")]


def center_and_deviation(losses: Iterable[float]) -> tuple[float, float]:
    """The median, and a standard deviation that outliers do not move."""
    losses = list(losses)
    median = statistics.median(losses)
    return median, _DEVIATION * statistics.median(abs(loss - median) for loss in losses)


def num_bad_steps(settings: Settings, skipped: Iterable[Skipped], step: int) -> int:
    """How many of the bad steps of this run count at its step of that number."""
    since = 0 if settings.within_steps is None else step - settings.within_steps
    return len({one.step for one in skipped if not one.is_inherited and one.step > since})
