"""The evaluations of a run: when a score is due, what is written, and what may not go on after one.

before step 1:   row 0, held against the parent's last row
on a schedule:   every source, once a step, and at every stage's end; then `stop_if`
on the way on:   what a stop, or an end in mid-evaluation, left out at the place of the checkpoint
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from cpt.checkpoint import Place, RunFolder
from cpt.engine import Engine
from cpt.evaluation.guard import Verdict, verdict_after
from cpt.evaluation.held_out import HeldOut
from cpt.evaluation.history import read_history
from cpt.evaluation.measures import lines_about
from cpt.evaluation.start_gate import StartGate
from cpt.lineage.ledger import Stop
from cpt.observe.journal import Journal
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress
from cpt.run.beginning import TrainingError
from cpt.run.settings import Run

_log = logging.getLogger(__name__)

STOPPED = "stopped.json"  # why `stop_if` stopped the run


@dataclass
class Scoring:
    """The scores of one run on its held-out sources. Every method is collective, with the same answer on all ranks."""

    run: Run
    mesh: Mesh
    folder: RunFolder
    engine: Engine
    journal: Journal
    held_out: dict[str, HeldOut]

    def before_first_step(self, gate: StartGate | None, scores_above: dict[str, dict[str, Any]]) -> None:
        """Row 0. Raises TrainingError if a loss is not the parent's last one of that source, in `scores_above`.

        Warns of new sources that no held-out text has the name of: what is learned of them stands nowhere.
        """
        self._warn_of_what_is_not_scored()
        for record in self._score(Progress(), "start", stage_end=False):
            above = scores_above.get(record["source"])
            if gate and above and above["evaluated_tokens"] == record["evaluated_tokens"]:
                expected, origin = above["loss"], f"at the end of {self.run.parent.run}"
                if fault := gate.fault_at_source(record["source"], record["loss"], expected, origin):
                    raise TrainingError(fault)

    def is_due(self, progress: Progress, stage_end: bool) -> bool:
        """Whether every source is to be scored after the step that led to `progress`."""
        return stage_end or progress.crosses(self.run.evaluation.every_tokens)

    def after_step(self, place: Place, stage: str, stage_end: bool) -> tuple[Place, bool]:
        """Score at `place`; the place, with the stop in its ledger if `stop_if` ends the run, and whether it does."""
        self._score(place.progress, stage, stage_end)
        return self._judged(place, stage)

    def at_checkpoint(self, place: Place) -> Place:
        """Score what was left out there; the place as `after_step` gives it."""
        progress, is_stage_end = place.progress, place.progress.stage_tokens == 0
        index = progress.stage - is_stage_end
        stage = self.run.stages[index].name
        if progress.step and self.is_due(progress, is_stage_end):
            self.engine.use_model_settings(self.run.model_of(index))
            self._score(progress, stage, is_stage_end)
        return self._judged(place, stage)[0]

    def refuse_what_was_forgotten(self, step: int) -> None:
        """Raise TrainingError if `stop_if` stops the run at that step, which is saved. Leave a note, or take it off."""
        has_forgotten = self._has_forgotten(step)
        verdict = self._verdict(step) if has_forgotten else None
        if verdict is not None:
            self.folder.write_json(STOPPED, {"step": step, "stop_if": verdict.as_json()})
        elif self.mesh.is_first:
            (self.folder.path / STOPPED).unlink(missing_ok=True)
        if has_forgotten:
            raise TrainingError(verdict.as_line(step) if verdict else "stopped by stop_if; the first rank says why")

    def _warn_of_what_is_not_scored(self) -> None:
        names = dict.fromkeys(name for stage in self.run.stages for name in stage.sources)
        lacking = [name for name in names if name not in self.held_out]
        if not lacking or not self.mesh.is_first:
            return
        what = f"what is learned of {', '.join(lacking)}" if self.held_out else "this run"
        _log.warning(
            "%s is scored nowhere: there is no held-out text of %s; name it in evaluation.held_out, or keep the end of "
            "a source for that (stages.N.sources.%s.hold_out: 1%%)", what, ", ".join(lacking), lacking[0],
        )  # fmt: skip

    def _judged(self, place: Place, stage: str) -> tuple[Place, bool]:
        """The place with `stop_if`'s stop in its ledger, as the first rank reads it from the scores; is there one?"""
        if not self.run.stop_if.forgetting:
            return place, False
        step, told = place.progress.step, ""
        if verdict := self._verdict(step):
            stop = Stop(stage, step, verdict.source, round(verdict.forgetting, 6), verdict.above)
            told = json.dumps(stop.as_json())
        told = self.mesh.texts(told)[0]
        return (place.stopped_by(Stop.from_json(json.loads(told))), True) if told else (place, False)

    def _has_forgotten(self, step: int) -> bool:
        """Whether a limit of `stop_if` is exceeded by the evaluation at that step."""
        return bool(self.run.stop_if.forgetting) and self.mesh.any(self._verdict(step) is not None)

    def _verdict(self, step: int) -> Verdict | None:
        """What the first rank, which wrote the scores, reads from them."""
        return verdict_after(self.run.stop_if, read_history(self.folder.path), step) if self.mesh.is_first else None

    def _score(self, progress: Progress, stage: str, stage_end: bool) -> list[dict[str, Any]]:
        """Score the sources that are not scored at this step yet; the first rank writes the answers."""
        records = []
        for name, held_out in self.held_out.items():
            if self.mesh.any(self.journal.has_scored(progress.step, name)):
                continue
            started = time.perf_counter()
            score = held_out.score(self.engine.token_losses, self.mesh, self.run.evaluation.micro_batch)
            records.append(
                {
                    "step": progress.step,
                    "tokens": progress.tokens,
                    "stage": stage,
                    "stage_end": stage_end,
                    "source": name,
                    "loss": score.loss,
                    "bits_per_byte": score.bits_per_byte,
                    "evaluated_tokens": score.num_tokens,
                    "interval": score.interval,
                    "interval_over": score.interval_over,
                    "evaluation_seconds": round(time.perf_counter() - started, 6),
                }
            )
        if records:
            self.journal.scores(records)
        if records and stage_end and self.mesh.is_first:
            for line in lines_about(read_history(self.folder.path)):
                _log.info("after stage %s: %s", stage, line)
        return records
