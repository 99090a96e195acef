"""Where a run begins: anew, from its own checkpoint, a parent's or a Hugging Face folder; and whether it does."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from cpt.checkpoint import Checkpoint, Place, RunFolder, find_checkpoint
from cpt.config import Fault, as_mapping, read_mapping
from cpt.engine import Engine
from cpt.evaluation.held_out import HeldOut
from cpt.evaluation.start_gate import StartGate
from cpt.huggingface.probe import fitted
from cpt.huggingface.start import loss_of_folder
from cpt.lineage import tree
from cpt.observe.records import read_records
from cpt.parallel.mesh import Mesh
from cpt.run.reading import differences, in_full
from cpt.run.settings import Run

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on, and no setting is to blame; one line says why and where the last checkpoint is."""


def where_to_begin(
    run: Run, folder: RunFolder, mesh: Mesh
) -> tuple[Place | None, Checkpoint | None, tree.Parent | None]:
    """Place, checkpoint to load (None: initial weights) and parent; the place is None if the run is finished."""
    folder.refuse_other_contents()
    if folder.is_run:
        began = in_full(read_mapping([str(folder.path / "run.yaml")]))
        differing = differences(began, as_mapping(run))
        if differing:
            way_out = f"output = {folder.path} holds another run; name another output, or set these back:"
            raise Fault([way_out, *differing])
        old, new = began.get("batch", {}).get("windows"), run.batch.windows
        if old not in (None, new):
            _log.warning(
                "batch.windows is %s from here on, it was %s: the order of the windows stays the same", new, old
            )
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
    checkpoint = checkpoint_of_parent(run)
    place = Place.of_child(checkpoint.state)
    from_there = checkpoint.state["progress"]
    _log.info("a child of %s at step %d", run.parent.run, from_there["step"])
    return (
        place,
        checkpoint,
        tree.Parent(run.parent.run, from_there["step"], from_there["tokens"], checkpoint.state["rate"]),
    )


def checkpoint_of_parent(run: Run) -> Checkpoint:
    """The checkpoint that a child begins from. Raises Fault if there is none, or the parent is not finished."""
    above = RunFolder(run.parent.run)
    if run.parent.at == "latest" and not above.is_finished:
        raise Fault(
            f"parent.run = {above.path} is not finished; start it again to let it finish, "
            "or name a step: parent.at=STEP"
        )
    checkpoint = find_checkpoint(above.checkpoints, run.parent.at)
    if checkpoint is None:
        raise Fault(f"parent.run = {above.path} has no checkpoint")
    return checkpoint


def open_gate(run: Run, mesh: Mesh, engine: Engine) -> StartGate | None:
    """The watch over a start from weights; None for a run that begins from none, or asks for no gate.

    Raises TrainingError if the run does not compute what the model computes that it was given.
    """
    if not run.gate.windows or not (run.parent or run.weights):
        return None
    path = next(iter([*run.evaluation.held_out.values(), *(s.corpus for s in run.stages[0].sources.values())]))
    text = HeldOut(path, run.sequence_length, run.gate.windows, run.is_within_documents)
    gate = StartGate(run.gate, lambda: text.score(engine.score, mesh, run.evaluation.micro_batch).loss)
    if run.weights:
        size = run.model.num_parameters
        tokens = fitted(text.first_windows(run.gate.windows), size)
        found = float(engine.score(tokens).sum()) / tokens[:, 1:].numel()
        here = _told_loss(run, size, tokens) if mesh.is_first else 0.0
        expected = float(mesh.sum(torch.tensor(here, dtype=torch.float64, device=mesh.device)))
        if math.isnan(expected):
            raise TrainingError(f"{run.weights}: its loss could not be had; gate.windows=0 leaves the gate out")
        if fault := gate.fault_at_source(str(path), found, expected, f"in {run.weights} under transformers"):
            raise TrainingError(fault)
    return gate


def _told_loss(run: Run, size: int, tokens: torch.Tensor) -> float:
    """The loss of the folder under transformers; NaN where that fails, because the other ranks wait for an answer."""
    try:
        return loss_of_folder(run.weights, size, tokens)
    except (Fault, OSError, RuntimeError, ValueError, ImportError) as error:
        _log.error("%s: transformers cannot compute with it: %s", run.weights, error)
        return math.nan


def scores_of_parent(run: Run, parent: tree.Parent) -> dict[str, dict[str, Any]]:
    """The parent's scores where the child leaves it, by source; none if the child computes in another way."""
    scores = parent.run / "scores.jsonl"
    if not scores.is_file():
        return {}
    above, here = in_full(read_mapping([str(parent.run / "run.yaml")])), as_mapping(run)
    if any(above.get(key) != here[key] for key in ("model", "attention", "sequence_length")):
        return {}
    return {record["source"]: record for record in read_records(scores) if record["step"] == parent.step}
