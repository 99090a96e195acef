"""Who descends from whom: `lineage.json` of each run folder names its parent, and so on up."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import Fault


@dataclass(frozen=True)
class Parent:
    """The run that this one continued, the checkpoint it began from, and the learning rate it ended with there."""

    run: Path
    step: int
    tokens: int
    learning_rate: float


@dataclass(frozen=True)
class Member:
    """One run of the tree."""

    run: Path
    parent: Parent | None


def write_lineage(run: Path, parent: Parent | None) -> None:
    """Write `lineage.json` of the run folder; the parent's place is kept relative to it, so that both can be moved."""
    plain: dict[str, Any] = {"format_version": 1, "run": run.name, "parent": None}
    if parent:
        plain["parent"] = {
            "run": os.path.relpath(parent.run, run),
            "step": parent.step,
            "tokens": parent.tokens,
            "learning_rate": parent.learning_rate,
        }
    (run / "lineage.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_lineage(run: Path) -> Member:
    """The run and its parent; Fault if the folder is no run."""
    try:
        plain = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(f"{run} is no run folder: it has no lineage.json; name the folder that a run wrote to") from None
    except (OSError, ValueError) as error:
        raise Fault(f"{run}/lineage.json cannot be read: {error}") from None
    above = plain["parent"]
    if above is None:
        return Member(run, None)
    return Member(run, Parent((run / above["run"]).resolve(), above["step"], above["tokens"], above["learning_rate"]))


def ancestry(run: Path) -> list[Member]:
    """The run and its ancestors, eldest last; ends where an ancestor's folder is gone."""
    members = [read_lineage(run)]
    while members[-1].parent and (members[-1].parent.run / "lineage.json").is_file():
        members.append(read_lineage(members[-1].parent.run))
    return members
