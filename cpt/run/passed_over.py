"""`passed_over.json` of a run folder: the windows that a rewind has found, which the run passes over on its way again.

A checkpoint from before them cannot know of them, so they stand here from the moment of the rewind on. A run that is
killed on its way back, and a child that goes on with the stage from an earlier checkpoint, pass over them as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cpt.checkpoint import RunFolder
from cpt.config import Fault
from cpt.lineage.ledger import Skipped

PASSED_OVER = "passed_over.json"


def read_passed_over(run: Path) -> tuple[Skipped, ...]:
    """In the order in which they were found; none if there is no such file. Raises Fault if it is damaged."""
    path = run / PASSED_OVER
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return tuple(map(Skipped.from_json, plain["skipped"]))
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{path} is damaged ({error!r}); what it named is in the ledgers of later checkpoints") from None


def write_passed_over(folder: RunFolder, skipped: Iterable[Skipped]) -> None:
    """Exchange the file; raises OSError if the disk does not take it."""
    folder.write_json(PASSED_OVER, {"skipped": [one.as_json() for one in skipped]})


def of_stage(skipped: Iterable[Skipped], stage: str) -> list[Skipped]:
    """Those of one stage."""
    return [one for one in skipped if one.stage == stage]
