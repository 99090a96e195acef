"""What a guard makes of replay's share after an evaluation: an entry for the ledger, the same on all ranks."""

from __future__ import annotations

import dataclasses
import json
import logging

from cpt.checkpoint import Place, RunFolder
from cpt.evaluation.history import read_history
from cpt.evaluation.raise_replay import share_after
from cpt.lineage.ledger import ShareChange
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress
from cpt.run.settings import Run

_log = logging.getLogger(__name__)


def with_replay_raised(run: Run, mesh: Mesh, folder: RunFolder, place: Place) -> Place:
    """`place`, within a stage and just evaluated, with a further change of replay's share if `raise_replay` wants one.

    Asked again at the same place, it says the same: on a resume the evaluation may or may not have been there before.
    All ranks call it; the first one, which wrote the scores, reads them.
    """
    stage = run.stages[place.progress.stage] if place.progress.stage_tokens else None
    if not run.raise_replay.forgetting or stage is None or stage.replay is None:
        return place
    begun = place.continued if stage.continues and place.continued else Progress()
    window = (begun.stage_tokens + place.progress.stage_tokens) // run.sequence_length
    last = place.share_changes[-1] if place.share_changes else None
    if last and last.window == window:
        return place
    told = ""
    if mesh.is_first:
        share, least = last.share if last else stage.replay.share, stage.replay.share
        raised = share_after(run.raise_replay, read_history(folder.path), place.progress.step, share, least)
        if raised:
            _log.info("%s", raised.as_line(stage.name, window))
            change = ShareChange(stage.name, window, raised.share, raised.source, round(raised.forgetting, 6))
            told = json.dumps(change.as_json())
    told = mesh.texts(told)[0]
    if not told:
        return place
    return dataclasses.replace(place, share_changes=(*place.share_changes, ShareChange.from_json(json.loads(told))))
