"""START HERE: one run from top to bottom. Two loops, over stages and over steps; everything else is called from them.

    settings --> where do we begin? --> engine --> [ stage: [ step: windows -> loss -> update ] score, save ] --> done
                 (new, resumed, child)

What is trained on when is decided by `cpt.data.order`, the learning rate by `cpt.schedules`, how forgetting is held off
by `cpt.methods`, how a step is computed by `cpt.engine`. All of them are functions of `Progress`; a run that was
stopped and taken up again therefore goes on as if nothing had happened. What comes of a step that was bad is in
`cpt.run.rewinding`. Each `alive(...)` is a sign for `cpt.parallel.watch`, which finds ranks that are gone or hang; what
starts a run again after that is `launcher/supervise.py`.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from cpt.checkpoint import Place, RunFolder
from cpt.config import beside, build
from cpt.data.check import open_corpora
from cpt.data.loader import Loader
from cpt.data.order import StageOrder
from cpt.data.share_table import share_table
from cpt.engine import Engine, StepResult
from cpt.evaluation.start_gate import StartGate
from cpt.lineage import chain
from cpt.models.layers.blocks import prepare_blocks
from cpt.models.layers.compiled import refuse_broken
from cpt.models.layers.cutting import built_part
from cpt.observe.journal import Journal
from cpt.observe.logs import log_to_file
from cpt.observe.records import number_or_none
from cpt.observe.signals import StopRequest, listening_for_stop
from cpt.observe.speed import find_peak
from cpt.parallel.mesh import Mesh
from cpt.parallel.seeds import seed_step
from cpt.parallel.together import alike, together
from cpt.parallel.verdict import COMPUTING, FIRST_LOADING, FIRST_STEP, LOADING, SAVING
from cpt.progress import Progress
from cpt.run import Run, Stage
from cpt.run.attempt import attempt
from cpt.run.beginning import TrainingError, open_gate, scores_of_parent, weights_of_folder, where_to_begin
from cpt.run.kernels import kernels_for
from cpt.run.opening import prepare_folder, settle_folder, tell_what_was_built
from cpt.run.out_of_memory import telling_of_memory
from cpt.run.raising import with_replay_raised
from cpt.run.rewinding import NOTHING_DONE, BadSteps
from cpt.run.saving import Saving
from cpt.run.scoring import Scoring
from cpt.run.stages import corpora_of, held_out_of, order_of, refuse_bad_stages

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended. `signal`: the number of the signal that stopped it, None if the run is finished.

    `asked`: of a signal that came to this rank, even if too late to stop it.
    """

    folder: Path
    step: int
    signal: int | None = None
    asked: int | None = None


def train(
    run: Run, mesh: Mesh, why_orphaned: Callable[[], str | None] = lambda: None, job: str | None = None
) -> Outcome:
    """Train `run` to its end, or until a signal asks to stop; goes on from its own checkpoint if there is one.

    `why_orphaned()` is asked before each step: a line if what started this process is gone, which stops the run too.
    `job`: the SLURM job that this is a part of.

    Raises Fault before anything is written if the settings cannot work, TrainingError if a step was not finite.
    """
    folder = RunFolder(run.output)
    place, checkpoint, parent = where_to_begin(run, folder, mesh)
    if place is None:
        return Outcome(folder.path, folder.steps_when_finished)
    with together(mesh):
        corpora = open_corpora(corpora_of(run), run.model.vocabulary, run.tokenizer, run.is_within_documents)
        held_out = held_out_of(run)
        refuse_bad_stages(run, place)
        refuse_broken(run.compile, mesh.device)
    kernels = kernels_for(run.kernels, mesh)
    cuts = beside(run.model, "CUTS")
    blocks = run.blocks_of_parts[mesh.pipeline.rank]
    shares_norms = run.mesh.shares_norms(run.sequence_length)

    def make_model() -> nn.Module:
        return built_part(lambda: build(run.model_before, "Model", kernels), cuts, mesh, blocks, shares_norms)

    with telling_of_memory(run, mesh):
        model = make_model()
        is_gathered, is_within_documents = run.zero == 3, run.is_within_documents
        compiled = prepare_blocks(model, run.recompute, run.compile, is_gathered, is_within_documents)
        with alike(mesh):
            engine = Engine(
                model,
                run.engine,
                mesh,
                [build(settings, "Method") for settings in run.methods],
                lambda groups: kernels.adamw(
                    groups, 0.0, (run.optimizer.beta1, run.optimizer.beta2), run.optimizer.epsilon
                ),
                decays=model.decays,
                make_model=make_model,
            )
        if checkpoint is not None:
            is_resumed = parent is None or place.progress.step > 0
            keeps_moments = is_resumed or run.optimizer_state == "keep"
            engine.load(checkpoint, with_optimizer=keeps_moments, with_methods=is_resumed)
            checkpoint.close()
        elif run.weights:
            engine.fill(weights_of_folder(run))
        else:
            engine.fill(
                lambda name, start, stop: model.initial_value(name, run.seed).reshape(-1)[start:stop], check=False
            )
    peak = find_peak(mesh.device, run.precision, run.log.peak_tflops)
    flops = model.flops_per_token(run.sequence_length)

    # No earlier: a parent that does not fit leaves nothing behind.
    with (
        folder.taken(mesh),
        listening_for_stop(why_orphaned, folder.path / "stop" if mesh.is_first else None) as stop,
        attempt(folder.path, mesh, place.progress.step, job) as this_attempt,
        telling_of_memory(run, mesh),
    ):
        with together(mesh):
            if mesh.is_first:
                prepare_folder(run, folder, parent, corpora)
        with together(mesh):
            log_to_file(folder.path, mesh.rank)
            mesh.watch.keep_in(folder.path)
        tell_what_was_built(run, mesh, model, kernels, compiled, peak.origin)
        with together(mesh):
            journal = Journal(
                folder.path,
                mesh.is_first,
                place.progress.step or -1,  # a beginning keeps nothing, not even half of the scores before step 1
                run.total_tokens,
                place.progress.tokens,
                run.log.every_steps,
            )
        gate = open_gate(run, mesh, engine) if place.progress.step == 0 else None
        scores_above = scores_of_parent(run, parent) if gate and parent else {}
        settle = partial(settle_folder, run, mesh, folder, parent, corpora, journal)
        saving = Saving(run.checkpoint, mesh, folder, engine.content, settle)
        saving.warn_of_little_room(run.num_bytes_of_checkpoint)
        scoring = Scoring(run, mesh, folder, engine, journal, held_out)
        bad_steps = BadSteps(run, mesh, folder, engine, journal, saving)
        whole_peak = peak.flops * mesh.size
        loop = _Loop(run, mesh, folder, engine, journal, scoring, gate, saving, bad_steps, stop, whole_peak, flops)
        try:
            if place.progress.step == 0:
                scoring.before_first_step(gate, scores_above)
            this_attempt.trains(place.progress.step)
            outcome = loop.run_stages(place)
            this_attempt.ends(outcome.step, outcome.signal, stop.is_by_file)
            return outcome
        finally:
            saving.close()
            journal.close()


@dataclass
class _Loop:
    """The two loops, with what they use at hand. `peak`: FLOP/s of all ranks; `flops`: FLOPs of one token."""

    run: Run
    mesh: Mesh
    folder: RunFolder
    engine: Engine
    journal: Journal
    scoring: Scoring
    gate: StartGate | None
    saving: Saving
    bad_steps: BadSteps
    stop: StopRequest
    peak: float
    flops: float

    def run_stages(self, place: Place) -> Outcome:
        """The outer loop, from `place` to the end of the run."""
        self.bad_steps.save_beginning(place)
        place = self._take_up(place)
        while place.progress.stage < len(self.run.stages):
            place = self.bad_steps.enter_stage(place)
            stage, order = self.run.stages[place.progress.stage], order_of(self.run, place)
            self.engine.use_model_settings(self.run.model_of(place.progress.stage))
            with self._open_loader(stage, order, place) as loader:
                place, was_stopped, was_rewound = self._run_steps(stage, order, loader, place)
            if was_rewound:
                place = self._take_up(place)
            if was_stopped:
                _log.warning(
                    "asked to stop: saved at step %d; the same command goes on from there", place.progress.step
                )
                number = self.stop.signal or signal.SIGTERM
                return Outcome(self.folder.path, place.progress.step, number, number)
        self._score_at_checkpoint(place)
        with together(self.mesh):
            self.journal.settle()
            if self.mesh.is_first:
                # A run that was ended right after its last save has not done so.
                self.saving.settle(place, place.ledger_before_stage)
                self.folder.finish(place.progress.step, place.progress.tokens)
        _log.info("finished at step %d: %s", place.progress.step, self.folder.path)
        return Outcome(self.folder.path, place.progress.step, asked=self.stop.signal)

    def _run_steps(self, stage: Stage, order: StageOrder, loader: Loader, place: Place) -> tuple[Place, bool, bool]:
        """The inner loop: steps of `stage` from `place` on, until it ends or its order goes on in another way.

        The place after them; whether a signal ended them; whether a rewind did, and the place is that of a checkpoint.
        """
        run, judge, before = self.run, self.bad_steps.judge, (place.share_changes, place.skipped)
        schedule = build(stage.schedule, "Schedule", stage.total_tokens, place.rate_before_stage)
        is_last, alive, loading, computing = False, self.mesh.watch.alive, FIRST_LOADING, FIRST_STEP
        while not is_last:
            started, progress = time.perf_counter(), place.progress
            first_slot, num_windows = progress.stage_tokens // run.sequence_length, run.windows_at(stage, progress)
            rate, result, why_skipped, trained_on = schedule.rate(progress), NOTHING_DONE, "", []
            alive(loading, progress.step + 1)
            if order.skipped_in(first_slot, num_windows):
                place, why_skipped = self.bad_steps.pass_over(place, order, first_slot, num_windows)
            else:
                seed_step(run.seed, progress.step, self.mesh.data_rank)
                batch = loader.batch(first_slot, num_windows)
                is_asked = self.stop.is_asked()
                alive(computing)
                result = self.engine.step(
                    batch.tokens, batch.sources, len(order.source_names), rate, progress, is_asked, batch.starts,
                    self.saving.is_asked_by_clock(), judge.before_update,
                )  # fmt: skip
                if bad := judge.found(result.loss, result.grad_norm, result.skipped):
                    alive(SAVING)
                    seconds, why_skipped = time.perf_counter() - started, bad.reason
                    place, is_back = self.bad_steps.deal_with(bad, place, order, batch, result, seconds)
                    if is_back:
                        return place, False, True
                else:
                    judge.learn(result.loss)
                    trained_on = order.identities(batch.windows)
                loading, computing = LOADING, COMPUTING
            self.saving.poll()
            place = place.after_step(num_windows * run.sequence_length, rate, chain.lengthen(place.chain, trained_on))
            self._record(stage, order, place, result, time.perf_counter() - started, why_skipped)
            if self.gate and (fault := self.gate.fault_after(place.progress.step)):
                raise TrainingError(fault)
            self._refuse_differing_copies(place.progress)
            is_last = place.progress.stage_tokens >= stage.total_tokens
            if is_last:
                self.engine.end_stage(place.progress)
            has_forgotten = False
            # Who asked to stop may not wait long: save first. What is due is scored when the run goes on from there.
            if not result.stop_asked and self.scoring.is_due(place.progress, is_last):
                place, has_forgotten = self.scoring.after_step(place, stage.name, is_last)
                place = place if is_last else with_replay_raised(run, self.mesh, self.folder, place)
            if place.skipped != before[1]:
                order = order_of(run, place)  # which knows of it
            ledger = place.recorded_in(order.ledger_after(first_slot + num_windows))
            if is_last:
                place = place.at_next_stage(ledger)
            is_end = result.stop_asked or has_forgotten or place.progress.stage == len(run.stages)
            alive(SAVING)
            if is_end:
                self.saving.save_last(place, ledger)
            elif is_last or self.saving.is_due(place.progress):
                self.saving.save(place, ledger)
            elif result.save_asked:
                self.saving.save(place, ledger, is_temporary=True)
            if has_forgotten:
                self.scoring.refuse_what_was_forgotten(place.progress.step)
            if result.stop_asked and place.progress.stage < len(run.stages):
                return place, True, False
            if (place.share_changes, place.skipped) != before:
                break  # the order goes on in another way
        return place, False, False

    def _take_up(self, place: Place) -> Place:
        """What comes before the next step at the beginning or a checkpoint: the place, as it goes on from there."""
        if place.progress.step == 0:
            self._warm(place)
            return place
        self._score_at_checkpoint(place)
        return with_replay_raised(self.run, self.mesh, self.folder, place)

    def _score_at_checkpoint(self, place: Place) -> None:
        """Score what was left out at the checkpoint there; what `stop_if` says is saved before it ends the run."""
        found, progress = self.scoring.at_checkpoint(place), place.progress
        if found != place:
            ledger = found.ledger_before_stage
            if progress.stage_tokens:
                num_slots = progress.stage_tokens // self.run.sequence_length
                ledger = found.recorded_in(order_of(self.run, found).ledger_after(num_slots))
            self.saving.save_last(found, ledger)
        self.scoring.refuse_what_was_forgotten(progress.step)

    def _refuse_differing_copies(self, progress: Progress) -> None:
        """Raise TrainingError if ranks that should hold the same weights do not, where that is looked at."""
        every = self.run.mesh.check_every_steps
        if every and progress.step % every == 0 and (names := self.engine.differing_copies()):
            raise TrainingError(
                f"after step {progress.step} the copies of {', '.join(names[:3])} differ between ranks: a machine "
                f"computes wrongly, or a sum between ranks does. {self.saving.way_on()}",
                is_final=False,
            )

    def _warm(self, place: Place) -> None:
        """Fill AdamW's moments at learning rate 0 on what the first stage begins with, if that is asked for."""
        if not self.run.warm_steps:
            return
        stage = self.run.stages[0]
        num_windows = self.run.windows_at(stage, Progress())
        with self._open_loader(stage, order_of(self.run, place), place) as loader:
            for step in range(self.run.warm_steps):
                first_slot = step * num_windows % (self.run.num_slots(stage) - num_windows + 1)
                batch = loader.batch(first_slot, num_windows)
                self.mesh.watch.alive(FIRST_STEP)
                self.engine.warm(batch.tokens, batch.sources, batch.starts)
        _log.info("filled AdamW's moments with %d steps at learning rate 0", self.run.warm_steps)

    def _open_loader(self, stage: Stage, order: StageOrder, place: Place) -> Loader:
        """The reader of a stage's windows; tells what it will read."""
        num_slots = self.run.num_slots(stage, place.progress.stage_tokens)
        for line in share_table(order, num_slots):
            _log.info("stage %s: %s", stage.name, line)
        return Loader(
            order,
            self.mesh.data_rank,
            self.mesh.data_size,
            self.run.loader,
            within_documents=self.run.is_within_documents,
            pin=self.mesh.device.type == "cuda",
            num_slots_in_stage=num_slots,
            vocabulary=self.run.model.vocabulary,
        )

    def _record(
        self, stage: Stage, order: StageOrder, place: Place, result: StepResult, seconds: float, why_skipped: str
    ) -> None:
        progress, num_tokens = place.progress, place.progress.step_tokens
        names, is_done = order.source_names, result is not NOTHING_DONE
        speed, num_bad = (num_tokens / seconds if is_done else 0.0), self.bad_steps.num_known(place)
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": stage.name,
            "loss": number_or_none(result.loss),
            "loss_by_source": {names[index]: number_or_none(loss) for index, loss in result.loss_by_source.items()},
            "learning_rate": place.rate,
            "s1": place.areas.forward,
            "s2": place.areas.annealing,
            "grad_norm": number_or_none(result.grad_norm),
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.flops / self.peak, 6),
            "skipped": int(bool(why_skipped)),
            **({"why_skipped": why_skipped} if why_skipped else {}),
            **({"bad_steps": num_bad} if num_bad else {}),
            **({} if why_skipped else self.engine.report()),
            **self.saving.news(),
        }
        self.journal.step(record, num_tokens)
        self.journal.order(
            {"step": progress.step, "windows": progress.tokens // self.run.sequence_length, "chain": place.chain}
        )
