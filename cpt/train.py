"""START HERE: one run from top to bottom. Two loops, over stages and over steps; everything else is called from them.

    settings --> where do we begin? --> engine --> [ stage: [ step: windows -> loss -> update ] score, save ] --> done
                 (new, resumed, child)

What is trained on when is decided by `cpt.data.order`, the learning rate by `cpt.schedules`, how forgetting is held off
by `cpt.methods`, how a step is computed by `cpt.engine`. All of them are functions of `Progress`; a run that was
stopped and taken up again therefore goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint import Checkpoint, Place, RunFolder, find_checkpoint
from cpt.config import Fault, as_mapping, build, read_mapping, write_yaml
from cpt.data.check import open_corpora
from cpt.data.corpus import Corpus
from cpt.data.loader import Batch, Loader
from cpt.data.order import StageOrder
from cpt.engine import Engine, StepResult
from cpt.evaluation.held_out import HeldOut
from cpt.lineage import chain, tree
from cpt.lineage.ledger import Ledger
from cpt.observe.journal import Journal
from cpt.observe.logs import log_to_file
from cpt.observe.signals import StopRequest, listening_for_stop
from cpt.observe.speed import find_peak
from cpt.parallel.mesh import Mesh
from cpt.parallel.seeds import derive_seed, seed_step
from cpt.progress import Progress
from cpt.run import Run, Stage, differences
from cpt_kernels import switch

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on, and no setting is to blame; one line says why and where the last checkpoint is."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended. `signal`: the number of the signal that stopped it, None if the run is finished."""

    folder: Path
    step: int
    signal: int | None = None


def train(run: Run, mesh: Mesh) -> Outcome:
    """Train `run` to its end, or until a signal asks to stop; goes on from its own checkpoint if there is one.

    Raises Fault before anything is written if the settings cannot work, TrainingError if a step was not finite.
    """
    folder = RunFolder(run.output)
    place, checkpoint, parent = _where_to_begin(run, folder, mesh)
    if place is None:
        return Outcome(folder.path, _steps_of(run))
    corpora = open_corpora(_corpora_of(run), run.model.vocabulary, run.parent.tokenizer if run.parent else None)
    held_out = {n: HeldOut(p, run.sequence_length, run.evaluation.windows) for n, p in run.evaluation.held_out.items()}
    _refuse_bad_stages(run, place)
    kernels = switch.choose(run.kernels, mesh.device)
    model = build(run.model, "Model", kernels)
    engine = Engine(
        model,
        run.engine,
        mesh,
        [build(settings, "Method") for settings in run.methods],
        lambda groups: kernels.adamw(groups, 0.0, (run.optimizer.beta1, run.optimizer.beta2), run.optimizer.epsilon),
        decays=model.decays,
    )
    if checkpoint is None:
        engine.fill(lambda name, start, stop: model.initial_value(name, run.seed).reshape(-1)[start:stop])
    else:
        is_resumed = parent is None or place.progress.step > 0
        keeps_moments = is_resumed or run.parent.optimizer_state == "keep"
        engine.load(checkpoint, with_optimizer=keeps_moments, with_methods=is_resumed)
    _prepare_folder(run, folder, mesh, parent, corpora)  # no earlier: a parent that does not fit leaves nothing behind
    peak = find_peak(mesh.device, run.precision, run.log.peak_tflops)
    _tell_what_was_built(run, mesh, model, kernels, peak.origin)
    flops = model.flops_per_token(run.sequence_length)

    with listening_for_stop() as stop:
        journal = Journal(
            folder.path,
            mesh.is_first,
            place.progress.step or -1,  # a beginning keeps nothing, not even half of the scores before the first step
            run.total_tokens,
            place.progress.tokens,
            run.log.every_steps,
        )
        loop = _Loop(run, mesh, folder, engine, journal, held_out, stop, peak.flops * mesh.size, flops)
        try:
            return loop.run_stages(place)
        finally:
            journal.close()


@dataclass
class _Loop:
    """The two loops, with what they use at hand. `peak`: FLOP/s of all ranks; `flops`: FLOPs of one token."""

    run: Run
    mesh: Mesh
    folder: RunFolder
    engine: Engine
    journal: Journal
    held_out: dict[str, HeldOut]
    stop: StopRequest
    peak: float
    flops: float

    def run_stages(self, place: Place) -> Outcome:
        """The outer loop, from `place` to the end of the run."""
        if place.progress.step == 0:
            self._score(place.progress, "start", stage_end=False)
        for stage in self.run.stages[place.progress.stage :]:
            order = _order_of(self.run, place)
            place, was_stopped = self._run_steps(stage, order, place)
            if was_stopped:
                _log.warning(
                    "asked to stop: saved at step %d; the same command goes on from there", place.progress.step
                )
                return Outcome(self.folder.path, place.progress.step, self.stop.signal or signal.SIGTERM)
        if self.mesh.is_first:
            self._settle(place, place.ledger_before_stage)  # a run that was ended right after its last save has not
            self.folder.finish(place.progress.step, place.progress.tokens)
        _log.info("finished at step %d: %s", place.progress.step, self.folder.path)
        return Outcome(self.folder.path, place.progress.step)

    def _run_steps(self, stage: Stage, order: StageOrder, place: Place) -> tuple[Place, bool]:
        """The inner loop: the steps of `stage` from `place` on. The place after them; whether a signal ended them."""
        run, num_windows, num_tokens = self.run, self.run.batch.windows, self.run.tokens_a_step
        schedule = build(stage.schedule, "Schedule", stage.total_tokens, place.rate_before_stage)
        loader = Loader(order, self.mesh.data_rank, self.mesh.data_size)
        num_steps = run.num_steps(stage)
        _tell_stage(stage, order, num_steps * num_windows)
        for stage_step in range(place.progress.stage_step, num_steps):
            started, progress = time.perf_counter(), place.progress
            seed_step(run.seed, progress.step, self.mesh.rank)
            batch = loader.batch(stage_step * num_windows, num_windows)
            rate = schedule.rate(progress)
            is_asked = self.stop.signal is not None
            result = self.engine.step(batch.tokens, batch.sources, len(order.source_names), rate, progress, is_asked)
            if result.skipped or not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                self._refuse_to_go_on(progress, order, batch, result)
            place = place.after_step(num_tokens, rate, chain.lengthen(place.chain, order.identities(batch.windows)))
            self._record(stage, order, place, result, time.perf_counter() - started)
            is_last = stage_step == num_steps - 1
            if is_last:
                self.engine.end_stage(place.progress)
            if is_last or place.progress.crosses(num_tokens, run.evaluation.every_tokens):
                self._score(place.progress, stage.name, stage_end=is_last)
            ledger = order.ledger_after((stage_step + 1) * num_windows)
            if is_last:
                place = place.at_next_stage(ledger)
            if is_last or result.stop_asked or place.progress.crosses(num_tokens, run.checkpoint.every_tokens):
                self._save(place, ledger)
            if result.stop_asked and place.progress.stage < len(run.stages):
                return place, True
        return place, False

    def _record(self, stage: Stage, order: StageOrder, place: Place, result: StepResult, seconds: float) -> None:
        progress, num_tokens = place.progress, self.run.tokens_a_step
        names = order.source_names
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": stage.name,
            "loss": result.loss,
            "loss_by_source": {names[index]: loss for index, loss in result.loss_by_source.items()},
            "learning_rate": place.rate,
            "grad_norm": result.grad_norm,
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(num_tokens / seconds, 1),
            "mfu": round(num_tokens / seconds * self.flops / self.peak, 6),
            "skipped": 0,  # a step that was not made ends the run
            **self.engine.report(),
        }
        self.journal.step(record, num_tokens)
        self.journal.order(
            {"step": progress.step, "windows": progress.step * self.run.batch.windows, "chain": place.chain}
        )

    def _score(self, progress: Progress, stage: str, stage_end: bool) -> None:
        """Score all held-out sources; the answers are the same on all ranks, the first one writes them."""
        records = []
        for name, held_out in self.held_out.items():
            score = held_out.score(self.engine.score, self.mesh, self.run.evaluation.micro_batch)
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
                }
            )
        if records and progress.step not in self.journal.scored_steps:
            self.journal.scores(records)

    def _save(self, place: Place, ledger: Ledger) -> None:
        started = time.perf_counter()
        target = self.folder.checkpoint_at(place.progress.step)
        self.engine.save(target, place.as_json(ledger))
        if self.mesh.is_first:
            self._settle(place, ledger)
        _log.info("saved %s in %.1f s", target, time.perf_counter() - started)

    def _settle(self, place: Place, ledger: Ledger) -> None:
        """What follows a save at `place`: older checkpoints go, `latest` and `ledger.json` speak of it."""
        self.folder.keep_newest(self.folder.checkpoint_at(place.progress.step), self.run.checkpoint.keep_last)
        self.folder.write_json("ledger.json", ledger.as_json())

    def _way_on(self) -> str:
        """What a user can do after a step that was not finite."""
        latest = self.folder.checkpoints / "latest"
        if not latest.is_file():
            return "Nothing was saved before; begin again in another output, with a lower learning rate"
        step = int(latest.read_text(encoding="utf-8").strip().removeprefix("step-"))
        parent = f"parent: {{run: {self.folder.path}, at: {step}}}"
        return (
            f"The checkpoint at step {step} is whole; go on from it in a child run with a lower learning rate: {parent}"
        )

    def _refuse_to_go_on(self, progress: Progress, order: StageOrder, batch: Batch, result: StepResult) -> None:
        name = f"nonfinite-step-{progress.step + 1:08d}.json"
        if self.mesh.is_first:
            windows = [
                {"source": order.source_names[stream], "first_token": first}
                for stream, first in zip(batch.windows.stream.tolist(), batch.windows.first_token.tolist(), strict=True)
            ]
            found = {"step": progress.step + 1, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
            self.folder.write_json(name, {**found, "windows": windows})
        was_made = "the update was left out" if result.skipped else "the update was made"
        raise TrainingError(
            f"step {progress.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: not finite; {was_made} "
            f"and the run ends. Its windows stand in {self.folder.path / name}. {self._way_on()}"
        )


def _where_to_begin(
    run: Run, folder: RunFolder, mesh: Mesh
) -> tuple[Place | None, Checkpoint | None, tree.Parent | None]:
    """Place, checkpoint to load (None: initial weights) and parent; the place is None if the run is finished."""
    folder.refuse_other_contents()
    if folder.is_run:
        began = read_mapping([str(folder.path / "run.yaml")])
        differing = differences(began, as_mapping(run))
        if differing:
            way_out = f"output = {folder.path} holds another run; name another output, or set these back:"
            raise Fault([way_out, *differing])
        if folder.is_finished:
            _log.info("%s is finished; nothing to do", folder.path)
            return None, None, None
        checkpoint = folder.latest()
        if checkpoint:
            place = Place.from_json(checkpoint.state)
            _log.info(
                "going on from %s: step %d, %d tokens", checkpoint.folder, place.progress.step, place.progress.tokens
            )
            return place, checkpoint, None
        _log.info("%s was begun but never saved; beginning again", folder.path)
    if run.parent is None:
        return Place(), None, None
    above = RunFolder(run.parent.run)
    if run.parent.at == "latest" and not above.is_finished:
        raise Fault(
            f"parent.run = {above.path} is not finished; start it again to let it finish, "
            "or name a step: parent.at=STEP"
        )
    checkpoint = find_checkpoint(above.checkpoints, run.parent.at)
    if checkpoint is None:
        raise Fault(f"parent.run = {above.path} has no checkpoint")
    place = Place.of_child(checkpoint.state)
    from_there = checkpoint.state["progress"]
    _log.info("a child of %s at step %d", above.path, from_there["step"])
    return (
        place,
        checkpoint,
        tree.Parent(above.path, from_there["step"], from_there["tokens"], checkpoint.state["rate"]),
    )


def _order_of(run: Run, place: Place) -> StageOrder:
    """The order of the stage that `place` stands in."""
    if place.progress.stage >= len(run.stages):
        place = dataclasses.replace(place, progress=Progress(stage=len(run.stages) - 1))
    stage = run.stages[place.progress.stage]
    seed = derive_seed(run.seed, "stage", place.progress.stage)
    return StageOrder(stage.sources, stage.replay, place.ledger_before_stage, run.sequence_length, seed)


def _refuse_bad_stages(run: Run, place: Place) -> None:
    """Raise Fault with what is wrong with any stage that is still to come, before anything is built.

    What a stage may replay is known now, because what the stages before it will consume is.
    """
    faults: list[str] = []
    for index in range(place.progress.stage, len(run.stages)):
        try:
            order = _order_of(run, dataclasses.replace(place, progress=Progress(stage=index)))
        except Fault as fault:
            faults.extend(f"stages.{index}: {line}" for line in fault.lines)
            break  # what comes after it would be told wrongly
        ledger = order.ledger_after(run.num_steps(run.stages[index]) * run.batch.windows)
        place = dataclasses.replace(place, ledger_before_stage=ledger)
    if faults:
        raise Fault(faults)


def _corpora_of(run: Run) -> dict[str, Path]:
    """Every corpus of the run, by the setting that names it."""
    sources = {
        f"stages.{i}.sources.{name}": source.corpus
        for i, stage in enumerate(run.stages)
        for name, source in stage.sources.items()
    }
    return {**sources, **{f"evaluation.held_out.{name}": path for name, path in run.evaluation.held_out.items()}}


def _prepare_folder(run: Run, folder: RunFolder, mesh: Mesh, parent: tree.Parent | None, corpora: list[Corpus]) -> None:
    """Make the folder with `run.yaml`, `lineage.json` and the tokenizer; start this rank's log file."""
    if mesh.is_first:
        folder.make()
        # First: it makes the folder a run's. What comes after is made again if the run was ended in between.
        write_yaml(run, folder.path / "run.yaml", "Every setting of this run; cpt train FILE starts the same again.")
        if not (folder.path / "lineage.json").is_file():
            tree.write_lineage(folder.path, parent)
        tokenizer = next((c.tokenizer for c in corpora if c.tokenizer), run.parent.tokenizer if run.parent else None)
        if tokenizer and not (folder.path / "tokenizer").is_dir():
            aside = folder.path / "tokenizer.aside"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(tokenizer, aside).rename(folder.path / "tokenizer")
    mesh.wait()
    log_to_file(folder.path, mesh.rank)


def _steps_of(run: Run) -> int:
    return sum(run.num_steps(stage) for stage in run.stages)


def _tell_what_was_built(run: Run, mesh: Mesh, model: Any, kernels: switch.Kernels, peak: str) -> None:
    accumulation = run.batch.windows_a_rank(mesh.data_size) // run.batch.micro_batch_on(mesh.data_size)
    _log.info(
        "%d parameters, %s, ZeRO %d on %d rank(s) of %s; a step is %d windows of %d tokens, %d micro-batch(es) a rank",
        model.num_parameters(), run.precision, run.zero, mesh.size, mesh.device.type, run.batch.windows,
        run.sequence_length, accumulation,
    )  # fmt: skip
    _log.info("kernels: %s", "; ".join(f"{operation}: {twin}" for operation, twin in kernels.told.items()))
    _log.info("MFU is told against %s, causal FLOP count", peak)


def _tell_stage(stage: Stage, order: StageOrder, num_slots: int) -> None:
    counts = dict(zip([*stage.sources, "replay"], order.mixture.counts(num_slots), strict=True))
    length = order.sequence_length
    told = [
        f"{name} {counts[name] * length:,} tokens ({counts[name] * length / corpus.num_tokens:.2f} epochs)"
        for name, corpus in zip(stage.sources, order.corpora, strict=False)
    ]
    if counts["replay"]:
        told.append(
            f"replay {counts['replay'] * length:,} tokens ({counts['replay'] / order.num_replayable:.2f} rounds)"
        )
    _log.info("stage %s: %s", stage.name, ", ".join(told))
