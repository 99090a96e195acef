"""Reads run folders as they lie on the disk, finished, running or killed, into plain records for tables and plots."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpt.config import Fault
from cpt.evaluation import ScoreMatrix, score_matrix
from cpt.evaluation.history import History, read_history
from cpt.observe.attempts import ATTEMPTS, read_attempts
from cpt.report.goodput import Goodput, goodput

logger = logging.getLogger(__name__)

METRICS, SCORES, LINEAGE, SETTINGS = "metrics.jsonl", "scores.jsonl", "lineage.json", "run.yaml"


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl; None where the line does not say."""

    step: int
    tokens: int
    stage: str
    loss: float | None
    learning_rate: float | None
    loss_by_source: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    skipped: int = 0  # 1 where this step made no update because its values were not finite


@dataclass(frozen=True)
class Parent:
    """Where a run began: the folder of its parent as lineage.json names it, and the point at which it left it."""

    folder: str
    step: int
    tokens: int


@dataclass(frozen=True)
class RunRecord:
    """All that a report needs of one run."""

    folder: Path
    label: str  # unlike all others in one report
    parent: Parent | None
    steps: tuple[StepRecord, ...]
    scores: ScoreMatrix
    settings: str  # run.yaml as it stands
    notes: tuple[str, ...] = ()  # what was wrong with the files, but not enough to stop
    parent_label: str | None = None  # of the parent, if it is in the same report
    tokens_before: int = 0  # tokens of the parents in the same report, up to where this run began
    history: History | None = None  # its scores and those of all its parents, in the report or not
    goodput: Goodput | None = None  # where its hours went, if its starts were noted

    @property
    def tokens(self) -> int:
        """Tokens that this run itself has trained on so far."""
        trained = self.steps[-1].tokens if self.steps else 0
        return max(trained, self.scores.rows[-1].tokens)


def read_runs(folders: Sequence[Path]) -> tuple[RunRecord, ...]:
    """The runs in the order given, each once, with unlike labels and with their parents found among one another.

    Raises Fault with a line for each folder that cannot be read.
    """
    records: dict[Path, RunRecord] = {}
    faults: list[str] = []
    for folder in folders:
        try:
            records.setdefault(Path(folder).resolve(), read_run(Path(folder)))
        except Fault as fault:
            faults += fault.lines
    if faults:
        raise Fault(faults)
    return with_family(with_unlike_labels(list(records.values())))


def read_run(folder: Path) -> RunRecord:
    """One run from its folder.

    A run that has just begun has no steps or scores yet. A last line that was torn when its writer was killed is left
    out and noted. Raises Fault if the folder is no run folder or one of its files is damaged.
    """
    if not folder.is_dir():
        raise Fault(f"{folder} is not a folder; name the folder of a run, the one that holds {SETTINGS} and {METRICS}")
    if not any((folder / name).is_file() for name in (METRICS, SCORES, SETTINGS)):
        raise Fault(f"{folder} is not a run folder: it holds no {SETTINGS}, {METRICS} or {SCORES}; name one that does")
    notes: list[str] = []
    metrics, scores = (read_json_lines(folder / name, notes) for name in (METRICS, SCORES))
    lineage = read_lineage(folder / LINEAGE)
    try:
        parent = parse_parent(lineage.get("parent"))
        steps = parse_steps(metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"{folder}: a line of {METRICS} or {LINEAGE} lacks a value or has a wrong one: {error!r}") from None
    account = read_goodput(folder, metrics, scores, notes)
    try:
        matrix = score_matrix(scores)
    except Fault as fault:
        raise Fault(f"{folder / SCORES}: {line}" for line in fault.lines) from None
    try:
        history = read_history(folder)
    except Fault as fault:  # of a parent's folder, which nobody asked to be shown
        history = None
        notes += [f"the parents of {folder} are left out: {line}" for line in fault.lines]
    for note in notes:
        logger.warning(note)
    settings = folder / SETTINGS
    return RunRecord(
        folder=folder,
        label=str(lineage.get("run") or folder.resolve().name),
        parent=parent,
        steps=steps,
        scores=matrix,
        settings=settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else "",
        notes=tuple(notes),
        history=history,
        goodput=account,
    )


def read_goodput(
    folder: Path, metrics: list[dict[str, object]], scores: list[dict[str, object]], notes: list[str]
) -> Goodput | None:
    """Where the hours of a run went; None, noted if there is a damaged file, where that cannot be told."""
    try:
        return goodput(read_attempts(folder), metrics, scores)
    except (KeyError, TypeError) as error:
        notes.append(f"{folder / ATTEMPTS}: an event lacks a value or has a wrong one, {error!r}; its time is not told")
        return None


def read_json_lines(path: Path, notes: list[str]) -> list[dict[str, object]]:
    """The objects of a file, one a line; none if there is no file. Notes a torn last line and leaves it out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    objects: list[dict[str, object]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        elif number == len(lines):
            notes.append(f"{path}: the last line, {number}, is torn and was left out; its writer was stopped in it")
        else:
            raise Fault(
                f"{path} line {number} is not a JSON object: {line[:60].decode(errors='replace')!r}; "
                f"a stopped writer only tears the last line: mend this one or take it out"
            )
    return objects


def read_lineage(path: Path) -> dict[str, object]:
    """What `lineage.json` says; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        lineage = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Fault(f"{path} is not JSON: {error}; restore it from a checkpoint or take it out") from None
    if not isinstance(lineage, dict):
        raise Fault(f"{path} is not a JSON object; restore it from a checkpoint or take it out")
    return lineage


def parse_parent(parent: dict[str, object] | None) -> Parent | None:
    """The parent that `lineage.json` names, None for a run without."""
    if parent is None:
        return None
    return Parent(folder=str(parent["run"]), step=int(parent["step"]), tokens=int(parent["tokens"]))


def parse_steps(lines: Iterable[dict[str, object]]) -> tuple[StepRecord, ...]:
    """Steps in order. Where they go back, the run went on from an earlier checkpoint: the lost ones are left out."""
    steps: list[StepRecord] = []
    for line in lines:
        record = StepRecord(
            step=int(line["step"]),
            tokens=int(line["tokens"]),
            stage=str(line.get("stage", "")),
            loss=number_or_none(line.get("loss")),
            learning_rate=number_or_none(line.get("learning_rate")),
            loss_by_source={
                str(source): float(loss)
                for source, loss in (line.get("loss_by_source") or {}).items()
                if loss is not None
            },
            tokens_per_second=number_or_none(line.get("tokens_per_second")),
            skipped=int(line.get("skipped") or 0),
        )
        while steps and steps[-1].step >= record.step:
            steps.pop()
        steps.append(record)
    return tuple(steps)


def number_or_none(value: object) -> float | None:
    """A JSON number as a float; None stays None."""
    return None if value is None else float(value)


# ---- several runs together


def with_unlike_labels(records: list[RunRecord]) -> list[RunRecord]:
    """Runs of one name are told apart by as much of their folders as it takes."""
    labels = [record.label for record in records]
    if len(set(labels)) == len(labels):
        return records
    common = os.path.commonpath([record.folder.resolve().parent for record in records])
    return [
        replace(record, label=os.path.relpath(record.folder.resolve(), common))
        if labels.count(record.label) > 1
        else record
        for record in records
    ]


def with_family(records: list[RunRecord]) -> tuple[RunRecord, ...]:
    """Each run told which of the others is its parent, and how many tokens came before it."""
    parents = {record.label: find_parent(record, records) for record in records}
    return tuple(
        replace(
            record,
            parent_label=parent.label if (parent := parents[record.label]) else None,
            tokens_before=tokens_before(record, parents),
        )
        for record in records
    )


def tokens_before(record: RunRecord, parents: dict[str, RunRecord | None]) -> int:
    """Tokens from the start of the eldest ancestor in the report to the start of this run."""
    tokens, passed = 0, set()
    while (parent := parents[record.label]) is not None and record.label not in passed:
        passed.add(record.label)  # two runs that name each other as parents must not keep us here
        tokens += record.parent.tokens
        record = parent
    return tokens


def find_parent(record: RunRecord, records: list[RunRecord]) -> RunRecord | None:
    """The parent among the others: by its path, from the run's own folder or from here; else by its folder's name."""
    if record.parent is None:
        return None
    named = Path(record.parent.folder)
    places = {(start / named).resolve() for start in (Path.cwd(), record.folder, record.folder.parent)}
    others = [other for other in records if other is not record]
    by_path = [other for other in others if other.folder.resolve() in places]
    by_name = [other for other in others if other.folder.resolve().name == named.name]  # the runs may have been moved
    found = by_path or by_name
    return found[0] if len(found) == 1 else None
