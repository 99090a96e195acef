"""The factor on the loss that keeps small gradients from vanishing in fp16, and what follows when it was too large.

    step --> try: forward, backward, gradients / scale --finite--> update
              ^                               | not finite
              +---- the same windows, half the scale

Gradients that are not finite cost a try and no windows, so that the order of data stays a function of progress.
DeepSpeed's own scaler is left alone, for two reasons: it discards the windows of such a step, and in a step after which
it doubles the scale it divides gradients by the new one already (0.19.8: where they are not clipped, and at stage 3
their norm always).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpt.config import Fault
from cpt.engine.left_out import let_go_of_gradients
from cpt.engine.micro_batches import LossOf, MicroBatch
from cpt.parallel.mesh import Mesh

_log = logging.getLogger(__name__)
# Where the scale stops growing, should gradients stay 0: far above what any gradient of a mean loss needs.
_LARGEST = 2.0**24


@dataclass(frozen=True)
class Settings:
    """The scale of fp16's loss: `initial`, doubled after `growth_steps` updates without an overflow, halved by each.

    Below `smallest` it does not go: a step that overflows there was not finite. `fixed`: this scale always, and a step
    that overflows was not finite. All are powers of two, which round nothing.
    """

    initial: float = 65536.0
    growth_steps: int = 1000
    smallest: float = 1.0
    fixed: float | None = None

    def faults(self) -> list[str]:
        """Scales that would round, a smallest above the first, a count below one."""
        scales = {"initial": self.initial, "smallest": self.smallest, "fixed": self.fixed}
        faults = [
            f"{name} = {value:g}: a power of two, such as {_near(value)}, so that scaling rounds nothing"
            for name, value in scales.items()
            if value is not None and not _is_power_of_two(value)
        ]
        if self.growth_steps < 1:
            faults.append(f"growth_steps = {self.growth_steps}: at least 1")
        if not faults and self.smallest > self.initial:
            faults.append(f"smallest = {self.smallest:g}: not above initial = {self.initial:g}")
        return faults


def _is_power_of_two(value: float) -> bool:
    return value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5


def _near(value: float) -> str:
    return f"{2.0 ** math.floor(math.log2(value)):g}" if value > 0 and math.isfinite(value) else "65536"


def refuse_without_fp16(device: torch.device) -> None:
    """Raise Fault if DeepSpeed does not compute in fp16 on this kind of device."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        needs = ", which must have AVX-512 FP16 for it" if device.type == "cpu" else ""
        raise Fault(f"precision = fp16: DeepSpeed does not train in it on this {device.type}{needs}; use bf16 or fp32")


class LossScale:
    """The scale as it is now; the same on all ranks, because they see the same overflows.

    `used` is that of the last try, `retries` how many tries of the last step overflowed and were made again.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.scale = settings.initial if settings.fixed is None else settings.fixed
        self._good_updates = 0  # since the scale last changed
        self.used, self.retries = self.scale, 0

    def begin_step(self) -> None:
        """No try was made yet."""
        self.retries = 0

    def begin_try(self) -> float:
        """The factor for the try that begins."""
        self.used = self.scale
        return self.scale

    def end_good_try(self) -> None:
        """The update was made: time to grow comes nearer."""
        self._good_updates += 1
        if self._settings.fixed is None and self._good_updates >= self._settings.growth_steps:
            self.scale, self._good_updates = min(2 * self.scale, _LARGEST), 0

    def lower(self) -> bool:
        """Halve the scale for another try; False if there is no lower one."""
        if self._settings.fixed is not None or self.scale / 2 < self._settings.smallest:
            return False
        self.scale, self._good_updates = self.scale / 2, 0
        self.retries += 1
        return True

    def report(self) -> dict[str, float]:
        """What the last step has to tell, for `metrics.jsonl`."""
        return {"loss_scale": self.used, "retries": self.retries}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run has the same tries."""
        return {"scale": self.scale, "good_updates": self._good_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; a fixed scale stays what it is set to."""
        if self._settings.fixed is None:
            self.scale, self._good_updates = state["scale"], state["good_updates"]


class Scaled:
    """Trains as `run` does, with a scale on the loss, again for as long as gradients overflow and it can be lowered.

    `engine` is DeepSpeed's. `was_refused()`: the last update was left out for another reason than an overflow.
    """

    def __init__(
        self, run: Any, engine: Any, mesh: Mesh, scale: LossScale, was_refused: Callable[[], bool] = lambda: False
    ) -> None:
        self._run, self._engine, self._mesh, self._scale = run, engine, mesh, scale
        self._was_refused = was_refused
        # DeepSpeed's own scaler would tell of a skipped step.
        engine.optimizer.loss_scaler.update_scale = lambda overflow: None

    def train(self, micro_batches: Sequence[MicroBatch], loss_of: LossOf) -> None:
        """Forward and backward of each, and the update, in as many tries as it takes; none if a loss is not finite.

        After a step without an update the scale is what it was before it: its windows are to blame, and are no measure.
        """
        self._scale.begin_step()
        before = self._scale.state_dict()
        while True:
            losses: list[Tensor] = []

            def remembered(micro_batch: MicroBatch, outputs: Any, losses: list[Tensor] = losses) -> Tensor:
                loss = loss_of(micro_batch, outputs)
                losses.append(loss.detach())
                return loss

            self._engine.optimizer.override_loss_scale(self._scale.begin_try())
            self._run.train(micro_batches, remembered)
            if self._engine.was_step_applied():
                self._scale.end_good_try()
                return
            # A loss that is not finite is not the scale's doing, and no lower one would mend it.
            is_lost = any(not loss.isfinite() for loss in losses)
            is_hopeless = self._mesh.any(is_lost) or self._was_refused() or not self._scale.lower()
            let_go_of_gradients(self._engine.optimizer)
            if is_hopeless:
                self._scale.load_state_dict(before)
                return
            _log.info("gradients overflow fp16: once more with loss scale %g", self._scale.scale)
