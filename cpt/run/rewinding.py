"""What becomes of a run after a bad step: it ends, goes on without it, or goes back to a checkpoint from before it.

    bad step --autopsy--> too many? ends
                          stop:       ends
                          skip_step:  its update was left out; its windows are entered in the ledger
                          rewind:     wait for the save that is on its way
                                      -> newest whole checkpoint before what is to be passed over; later ones go
                                      -> `passed_over.json`        from here on a killed run comes back to the same
                                      -> weights, moments, methods, lines, place

Nothing else is kept of the way that led to the bad step: what the loop does next is what it does after a resume.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field

from cpt.checkpoint import Checkpoint, Place, RunFolder, find_checkpoint
from cpt.config import Fault
from cpt.data.loader import Batch
from cpt.data.order import StageOrder
from cpt.engine import Engine, StepResult
from cpt.lineage.ledger import Skipped
from cpt.observe.attempts import note_attempt
from cpt.observe.journal import Journal
from cpt.observe.records import read_records
from cpt.parallel.mesh import Mesh
from cpt.parallel.together import together
from cpt.run.autopsy import autopsy_of, write_autopsy
from cpt.run.bad_steps import Bad, Judge, num_bad_steps
from cpt.run.beginning import TrainingError
from cpt.run.passed_over import of_stage, read_passed_over, write_passed_over
from cpt.run.saving import Saving
from cpt.run.settings import Run

_log = logging.getLogger(__name__)


@dataclass
class BadSteps:
    """The bad steps of one run. Every method but `num_known` is collective, alike on all ranks."""

    run: Run
    mesh: Mesh
    folder: RunFolder
    engine: Engine
    journal: Journal
    saving: Saving
    judge: Judge = field(init=False)
    passed_over: tuple[Skipped, ...] = field(init=False, default=())  # by rewinds

    def __post_init__(self) -> None:
        self.judge = Judge(self.run.bad_steps, self.mesh, self.folder.path / "metrics.jsonl")
        with together(self.mesh):
            self.passed_over = read_passed_over(self.folder.path)

    def enter_stage(self, place: Place) -> Place:
        """The place with what is passed over in its stage; the losses of the stage so far are known from here on."""
        name = self.run.stages[place.progress.stage].name
        self.judge.recall(name)
        return place.with_skipped(*of_stage(self.passed_over, name))

    def save_beginning(self, place: Place) -> None:
        """Save before the first step, so that there is something to go back to, if the settings know a rewind."""
        if self.run.bad_steps.can_rewind and place.progress.step == 0:
            self.saving.save(place, place.recorded_in(place.ledger_before_stage))

    def num_known(self, place: Place) -> int:
        """How many bad steps of this run count at `place`."""
        known = {*place.all_skipped, *self.passed_over}
        return num_bad_steps(self.run.bad_steps, known, place.progress.step)

    def deal_with(
        self, bad: Bad, place: Place, order: StageOrder, batch: Batch, result: StepResult, seconds: float
    ) -> tuple[Place, bool]:
        """The place from which the run goes on after a bad step, and whether that lies behind a rewind.

        `place`, `order`: before the step. `seconds`: how long it took. Raises TrainingError if the run ends.
        """
        progress, settings = place.progress, self.run.bad_steps
        first_slot, num_windows = progress.stage_tokens // self.run.sequence_length, len(batch.windows.stream)
        step, stage = progress.step + 1, self.run.stages[progress.stage].name
        number = self.num_known(place) + 1
        is_too_many = number > settings.at_most
        policy = "stop" if is_too_many or (bad.policy == "skip_step" and not result.skipped) else bad.policy
        losses = self.engine.window_losses().tolist()
        if self.mesh.is_first:
            by_source = {order.source_names[index]: loss for index, loss in result.loss_by_source.items()}
            numbers = {"loss": result.loss, "grad_norm": result.grad_norm, "loss_by_source": by_source}
            told = {"stage": stage, "reason": bad.reason, "policy": policy, **numbers}
            write_autopsy(self.folder.path, step, told, order, first_slot, batch.windows, losses)
        if policy == "stop":
            self._end(bad, step, result, is_too_many)
        found = Skipped(stage, order.slot_of_stage(first_slot), num_windows, step, bad.reason)
        if policy == "rewind":
            return self._rewind(place, order, found, seconds), True
        self._warn("step %d: %s; its update was left out (%d of %d)", step, bad.reason, number, settings.at_most)
        return place.with_skipped(found), False

    def pass_over(self, place: Place, order: StageOrder, first_slot: int, num_windows: int) -> tuple[Place, str]:
        """The place before a step of which some windows are passed over, and why: then all of them are.

        They are the same as those that were found, unless `batch.windows` has changed since.
        """
        found = order.skipped_in(first_slot, num_windows)
        window = order.slot_of_stage(first_slot)
        rest = [(window, found.window), (found.stop, window + num_windows)]
        more = [dataclasses.replace(found, window=a, number=b - a) for a, b in rest if a < b]
        if more:
            told = "step %d: %d windows are passed over that share it with those of step %d"
            self._warn(told, place.progress.step + 1, sum(one.number for one in more), found.step)
        return place.with_skipped(*more), f"{found.reason}, at step {found.step}"

    def _end(self, bad: Bad, step: int, result: StepResult, is_too_many: bool) -> None:
        made = "the update was left out" if result.skipped else "the update was made"
        settings = self.run.bad_steps
        within = f"in {settings.within_steps} steps" if settings.within_steps else "in this run"
        limit = f"it is one more than bad_steps.at_most = {settings.at_most} {within}, " if is_too_many else ""
        raise TrainingError(
            f"step {step}: {bad.reason}; {made}, {limit}and the run ends. Its windows stand in "
            f"{autopsy_of(self.folder.path, step)}. {self.saving.way_on()}",
            is_final=True,
        )

    def _rewind(self, place: Place, order: StageOrder, found: Skipped, seconds: float) -> Place:
        """The place of the checkpoint that the run is at afterwards."""
        began, progress = time.perf_counter(), place.progress
        self.saving.wait()
        first_slot = self._first_slot(place)
        steps_back = min(self.run.bad_steps.skip_before, progress.stage_step)
        checkpoint = self._checkpoint_before(progress.step - steps_back) or self._checkpoint_before(progress.step)
        if checkpoint is None:
            raise TrainingError(
                f"step {found.step}: {found.reason}; there is no checkpoint to go back to, and the run ends. Its "
                f"windows stand in {autopsy_of(self.folder.path, found.step)}."
            )
        there = Place.from_json(checkpoint.state)
        if there.progress.step > progress.step - steps_back:  # those from before are kept no longer
            first_slot = max(first_slot, there.progress.stage_tokens // self.run.sequence_length)
        window = order.slot_of_stage(first_slot)
        self.passed_over += (Skipped(found.stage, window, found.stop - window, found.step, found.reason),)
        with together(self.mesh):
            if self.mesh.is_first:
                self.folder.forget_after(checkpoint.folder)
                write_passed_over(self.folder, self.passed_over)
        self.engine.load(checkpoint, with_optimizer=True, with_methods=True)
        checkpoint.close()
        with together(self.mesh):
            lost = self.journal.rewind(there.progress.step, there.progress.tokens)
        seconds += lost + time.perf_counter() - began
        reason, number = found.reason, self.num_known(there)
        if self.mesh.is_first:
            where = {"step_from": found.step, "step_to": there.progress.step}
            note_attempt(self.folder.path, "rewound", **where, reason=reason, seconds=round(seconds, 3))
        self._warn(
            "step %d: %s; back to step %d, and the %d windows of stage %s from %d on are passed over (%d of %d)",
            found.step, reason, there.progress.step, found.stop - window, found.stage, window, number,
            self.run.bad_steps.at_most,
        )  # fmt: skip
        return there

    def _checkpoint_before(self, step: int) -> Checkpoint | None:
        """The newest whole checkpoint up to that step; None if there is none."""
        try:
            return find_checkpoint(self.folder.checkpoints, mesh=self.mesh, up_to=step)
        except Fault:  # each damaged one was told
            return None

    def _first_slot(self, place: Place) -> int:
        """The first slot of the stage that is passed over: that of the bad step, or of some step before it."""
        progress, back = place.progress, 0
        first_slot = progress.stage_tokens // self.run.sequence_length
        if self.run.bad_steps.skip_before and self.mesh.is_first:
            begins = progress.step - self.run.bad_steps.skip_before
            records = read_records(self.folder.path / "order.jsonl") if begins > 0 else ()
            before = next((line["windows"] for line in records if line["step"] == begins), 0)
            back = progress.tokens // self.run.sequence_length - before
        return max(0, first_slot - self.mesh.from_first([back])[0])

    def _warn(self, told: str, *values: object) -> None:
        if self.mesh.is_first:
            _log.warning(told, *values)


# What the loop has of a step that was not computed.
NOTHING_DONE = StepResult(math.nan, {}, math.nan, skipped=True, stop_asked=False, save_asked=False)
