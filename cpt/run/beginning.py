"""Where a run begins: anew, from its own checkpoint, a parent's or a Hugging Face folder; and whether it does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from cpt.checkpoint import Checkpoint, Place, RunFolder, find_checkpoint
from cpt.config import Fault, as_mapping, read_mapping
from cpt.data.prepare.old_pieces import old_pieces
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.engine import Engine
from cpt.evaluation.held_out import HeldOut
from cpt.evaluation.start_gate import StartGate
from cpt.huggingface.load import read_folder
from cpt.huggingface.probe import fitted
from cpt.huggingface.start import loss_of_folder, oddities
from cpt.lineage import tree
from cpt.models.growth import GrownWeights
from cpt.observe.records import read_records
from cpt.parallel.mesh import ALONE, Mesh
from cpt.parallel.together import alike, together
from cpt.run.passed_over import of_stage, read_passed_over
from cpt.run.reading import differences, in_full
from cpt.run.settings import Run
from cpt.run.stages import refuse_bad_stages

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on, and no setting is to blame; one line says why and where the last checkpoint is.

    All ranks raise it alike. `is_final`: the same command would come to the same end.
    """

    is_everybodys = True

    def __init__(self, line: str, is_final: bool = True) -> None:
        super().__init__(line)
        self.is_final = is_final


def where_to_begin(
    run: Run, folder: RunFolder, mesh: Mesh
) -> tuple[Place | None, Checkpoint | None, tree.Parent | None]:
    """Place, checkpoint to load (None: initial weights) and parent; the place is None if the run is finished."""
    with together(mesh):
        folder.refuse_other_contents()
        if mesh.is_first:
            folder.take_back()
    is_run, is_finished = folder.look(mesh)
    if is_run:
        with together(mesh):
            began = began_with(run, folder)
        old, new = began.get("batch", {}).get("windows"), run.batch.windows
        if old not in (None, new):
            _log.warning(
                "batch.windows is %s from here on, it was %s: the order within the stage stays the same", new, old
            )
        if is_finished:
            _log.info("%s is finished; nothing to do", folder.path)
            return None, None, None
        with alike(mesh):
            checkpoint = folder.latest(mesh)
        if checkpoint:
            place = Place.from_json(checkpoint.state)
            _log.info(
                "going on from %s: step %d, %d tokens", checkpoint.folder, place.progress.step, place.progress.tokens
            )
            return place, checkpoint, None
        _log.info("%s was begun but never saved; beginning again", folder.path)
    if run.parent is None:
        return Place(), None, None
    with alike(mesh):
        checkpoint = checkpoint_of_parent(run, mesh)
    with together(mesh):
        place = place_of_child(run, checkpoint.state)
    from_there = checkpoint.state["progress"]
    _log.info("a child of %s at step %d", run.parent.run, from_there["step"])
    return (
        place,
        checkpoint,
        tree.Parent(run.parent.run, from_there["step"], from_there["tokens"], checkpoint.state["rate"]),
    )


def began_with(run: Run, folder: RunFolder) -> dict[str, Any]:
    """The settings in full of the run that was begun in the folder. Raises Fault if that is another than `run`."""
    began = in_full(read_mapping([str(folder.path / "run.yaml")]))
    differing = differences(began, as_mapping(run))
    if differing:
        way_out = f"output = {folder.path} holds another run; name another output, or set these back:"
        raise Fault([way_out, *differing])
    return began


def refuse_bad_beginning(run: Run) -> None:
    """Raise Fault if training would refuse to begin, or to go on, with what the run names: its own folder, its parent,
    a folder of weights, its stages from there on. Files are looked for, and not read through.
    """
    folder, place = RunFolder(run.output), Place()
    folder.refuse_other_contents()
    if folder.is_run:
        began_with(run, folder)
    own = find_checkpoint(folder.checkpoints, check=False) if folder.is_run else None
    if own:
        place = Place.from_json(own.state)
    elif run.parent:
        place = place_of_child(run, checkpoint_of_parent(run, check=False).state)
    elif run.weights:
        read_folder(run.weights)
    refuse_bad_stages(run, place)


def place_of_child(run: Run, state: dict[str, Any]) -> Place:
    """The first place of a run whose parent was saved at `state`. Raises Fault if its first stage cannot go on with the
    parent's, as it says.
    """
    place = Place.of_child(state)
    if not run.stages[0].continues:
        return place
    plain, here = in_full(read_mapping([str(run.parent.run / "run.yaml")])), as_mapping(run)
    above = Place.from_json(state)
    stages = plain["stages"]
    told = stages[min(above.progress.stage, len(stages) - 1)]
    if above.progress.stage < len(stages):
        above = above.with_skipped(*of_stage(read_passed_over(run.parent.run), told["name"]))
    pairs = {
        "seed": (here["seed"], plain["seed"]),
        "sequence_length": (here["sequence_length"], plain["sequence_length"]),
        "stages.0.sources": (here["stages"][0]["sources"], told["sources"]),
        "stages.0.replay": (_order_of_replay(here["stages"][0]), _order_of_replay(told)),
    }
    differing = [name for name, (one, other) in pairs.items() if one != other]
    if differing:
        raise Fault(
            f"stages.0.continues: the windows of stage {told['name']} of {run.parent.run} come in the order that its "
            f"settings give, and here {' and '.join(differing)} are others; set them back, or leave continues out"
        )
    return place.going_on_with_stage_of(above, len(stages))


def _order_of_replay(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage's replay says of the order of its windows; how tokens are counted is nothing of it."""
    return {**(stage.get("replay") or {}), "accounting": None}


def checkpoint_of_parent(run: Run, mesh: Mesh = ALONE, check: bool = True) -> Checkpoint:
    """The checkpoint that a child begins from, the same on all ranks of `mesh`, which all call it; `check`: its bytes.

    Raises Fault if there is none, or the parent is not finished.
    """
    above = RunFolder(run.parent.run)
    if run.parent.at == "latest" and not above.is_finished:
        raise Fault(
            f"parent.run = {above.path} is not finished; start it again to let it finish, "
            "or name a step: parent.at=STEP"
        )
    checkpoint = find_checkpoint(above.checkpoints, run.parent.at, check, mesh)
    if checkpoint is None:
        raise Fault(f"parent.run = {above.path} has no checkpoint")
    return checkpoint


def weights_of_folder(run: Run) -> Callable[[str, int, int], torch.Tensor]:
    """Reads elements `start` to `stop` of a parameter, fp32, from the folder that the run begins with; grown if asked.

    Tells what is odd about the folder.
    """
    _, settings, weights = read_folder(run.weights)
    for line in oddities(run.weights, settings, weights):
        _log.warning("%s: %s", run.weights, line)
    if not run.growth:
        return lambda name, start, stop: weights.reader(name).read(start, stop).float()
    old, new = Tokenizer.open(run.weights), Tokenizer.open(run.growth.grow_to)
    pieces = old_pieces(old, new)
    _log.info("%d new tokens on %d, begun as %s", len(pieces), old.vocabulary_size, run.growth.init)
    grown = GrownWeights(weights, run.growth.init, pieces, old.vocabulary_size, run.seed, num_rows=settings.vocabulary)
    whole: dict[str, torch.Tensor] = {}  # the last of the two or fewer that grow, because making one takes all of it

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if not grown.is_grown(name):
            return weights.reader(name).read(start, stop).float()
        if name not in whole:
            whole.clear()
            whole[name] = grown[name].reshape(-1)
        return whole[name][start:stop]

    return read


def open_gate(run: Run, mesh: Mesh, engine: Engine) -> StartGate | None:
    """The watch over a start from weights; None for a run that begins from none, or asks for no gate.

    Raises TrainingError if the run does not compute what the model computes that it was given.
    """
    if not run.gate.windows or not (run.parent or run.weights):
        return None
    path = next(iter([*run.evaluation.held_out.values(), *(s.corpus for s in run.stages[0].sources.values())]))
    text = HeldOut(path, run.sequence_length, run.gate.windows, run.is_within_documents)
    gate = StartGate(run.gate, lambda: text.score(engine.token_losses, mesh, run.evaluation.micro_batch).loss)
    if run.weights:
        size = run.model.num_parameters
        tokens = _shareable(_in_old_tokens(run, text.first_windows(run.gate.windows)), size, mesh)
        found = float(engine.score(tokens).sum()) / tokens[:, 1:].numel()
        here = _told_loss(run, size, tokens) if mesh.is_first else 0.0
        expected = float(mesh.sum(torch.tensor(here, dtype=torch.float64, device=mesh.device)))
        if math.isnan(expected):
            raise TrainingError(f"{run.weights}: its loss could not be had; gate.windows=0 leaves the gate out")
        origin = f"in {run.weights} under transformers"
        # New tokens take their part of every probability, rows of padding that are dropped give theirs back.
        if run.growth and abs(found - expected) <= run.gate.largest_jump:
            _log.info("start: loss on %s in old tokens %.4f, %s %.4f", path, found, origin, expected)
        elif fault := gate.fault_at_source(str(path), found, expected, origin):
            raise TrainingError(fault)
    return gate


def _in_old_tokens(run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """The text of windows [B, S + 1] as the folder's own tokenizer cuts it, if the run has another; as long as all."""
    if not run.growth:
        return tokens
    old, new = Tokenizer.open(run.weights), Tokenizer.open(run.growth.grow_to)
    cut = [torch.from_numpy(old.encode(new.decode(window)).astype("int64")) for window in tokens.tolist()]
    return torch.stack([window[: min(map(len, cut))] for window in cut])[:, : tokens.shape[1]]


def _shareable(tokens: torch.Tensor, size: int, mesh: Mesh) -> torch.Tensor:
    """As much of windows [B, S + 1] as `fitted` leaves for a model of that size, in so many positions as tensor and
    sequence ranks can share: at least one each, and where there is too little text it comes again.
    """
    num_windows, length = fitted(tokens, size).shape
    unit = mesh.tensor.size * mesh.sequence.size
    length = 1 + max(1, (length - 1) // unit) * unit
    return tokens[:num_windows].repeat(1, -(-length // tokens.shape[1]))[:, :length]


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
    texts, texts_above = here["evaluation"]["held_out"], above.get("evaluation", {}).get("held_out", {})
    same = {name for name, path in texts.items() if texts_above.get(name) == path}  # a name may mean another text now
    return {
        record["source"]: record
        for record in read_records(scores)
        if record["step"] == parent.step and record["source"] in same
    }
