"""What the stages of a run draw from: their order, their corpora, and what cannot work about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpt.checkpoint import Place
from cpt.config import Fault, build
from cpt.data.corpus import Corpus
from cpt.data.order import StageOrder
from cpt.data.streams import trained_tokens
from cpt.evaluation.held_out import HeldOut
from cpt.parallel.seeds import derive_seed
from cpt.progress import Progress
from cpt.run.settings import Run


def order_of(run: Run, place: Place) -> StageOrder:
    """The order of the stage that `place` stands in."""
    if place.progress.stage >= len(run.stages):
        place = dataclasses.replace(place, progress=Progress(stage=len(run.stages) - 1))
    stage = run.stages[place.progress.stage]
    begun = place.continued if stage.continues and place.continued else Progress(stage=place.progress.stage)
    seed, num_slots_before = derive_seed(run.seed, "stage", begun.stage), begun.stage_tokens // run.sequence_length
    return StageOrder(
        stage.sources, stage.replay, place.ledger_before_stage, run.sequence_length, seed, num_slots_before,
        place.share_changes, place.skipped,
    )  # fmt: skip


def refuse_bad_stages(run: Run, place: Place) -> None:
    """Raise Fault with what is wrong with any stage that is still to come, before anything is built.

    What a stage may replay is known now, because what the stages before it will consume is.
    """
    faults: list[str] = []
    for index in range(place.progress.stage, len(run.stages)):
        try:
            order = order_of(run, dataclasses.replace(place, progress=Progress(stage=index)))
        except Fault as fault:
            faults.extend(f"stages.{index}: {line}" for line in fault.lines)
            break  # what comes after it would be told wrongly
        faults.extend(
            f"stages.{index}: {stream.corpus.path} is packed and its padding is no text; set attention: within_document"
            for stream in order.streams
            if stream.corpus.packed_length and not run.is_within_documents
        )
        tokens_done = place.progress.stage_tokens if index == place.progress.stage else 0
        num_slots = run.num_slots(run.stages[index], tokens_done)
        faults.extend(f"stages.{index}.{line}" for line in order.faults_over(num_slots))
        try:
            place = dataclasses.replace(place, rate=last_rate(run, index, place.rate_before_stage))
        except Fault as fault:
            faults.extend(f"stages.{index}.{line}" for line in fault.lines)
        ledger = order.ledger_after(num_slots)
        place = dataclasses.replace(place, ledger_before_stage=ledger, rate_before_stage=place.rate)
        place = dataclasses.replace(place, share_changes=(), skipped=())
    if faults:
        raise Fault(faults)


def last_rate(run: Run, index: int, rate_before: float) -> float:
    """Learning rate of the last step of the stage of that number. Raises Fault if its schedule cannot follow such a
    rate.
    """
    stage = run.stages[index]
    schedule = build(stage.schedule, "Schedule", stage.total_tokens, rate_before)
    return schedule.rate(Progress(stage=index, stage_tokens=run.tokens_before_last_step(stage)))


def corpora_of(run: Run) -> dict[str, Path]:
    """Every corpus of the run, by the setting that names it."""
    sources = {
        f"stages.{i}.sources.{name}": source.corpus
        for i, stage in enumerate(run.stages)
        for name, source in stage.sources.items()
    }
    declared = {
        f"stages.{i}.replay.declared.{name}": source.corpus
        for i, stage in enumerate(run.stages)
        for name, source in (stage.replay.declared if stage.replay else {}).items()
    }
    return {
        **sources,
        **declared,
        **{f"evaluation.held_out.{name}": path for name, path in run.evaluation.held_out.items()},
        **{f"evaluation.ends.{name}": end.corpus for name, end in run.evaluation.ends.items()},
    }


def held_out_of(run: Run) -> dict[str, HeldOut]:
    """All held-out text by name: of its own, and what sources of the run and its ancestors hold out."""
    of_its_own = {name: (path, 0) for name, path in run.evaluation.held_out.items()}
    ends = [(name, end.corpus, end.share) for name, end in run.evaluation.ends.items()]
    ends += [(n, s.corpus, s.hold_out) for stage in run.stages for n, s in stage.sources.items() if s.hold_out]
    of_sources = {
        name: (path, trained_tokens(Corpus.open(path), run.sequence_length, share)) for name, path, share in ends
    }
    return {
        name: HeldOut(
            path,
            run.sequence_length,
            run.evaluation.windows,
            run.is_within_documents,
            first,
            vocabulary=run.model.vocabulary,
        )
        for name, (path, first) in {**of_its_own, **of_sources}.items()
    }
