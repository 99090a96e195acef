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
    """One run of the tree. `weights`: the Hugging Face folder that it began with, if it did."""

    run: Path
    parent: Parent | None
    weights: str | None = None


def write_lineage(run: Path, parent: Parent | None, weights: Path | None = None) -> None:
    """Write `lineage.json` of the run folder; the parent's place is kept relative to it, so that both can be moved.

    `weights`: the Hugging Face folder that a run without a parent began with.
    """
    plain: dict[str, Any] = {"format_version": 1, "run": run.name, "parent": None}
    if weights:
        plain["weights"] = str(weights)
    if parent:
        plain["parent"] = {
            "run": os.path.relpath(parent.run.resolve(), run.resolve()),  # `..` means little beside a symbolic link
            "step": parent.step,
            "tokens": parent.tokens,
            "learning_rate": parent.learning_rate,
        }
    aside = run / "lineage.json.aside"
    aside.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    aside.replace(run / "lineage.json")


def read_lineage(run: Path) -> Member:
    """The run and its parent; Fault if the folder is no run or its `lineage.json` is damaged."""
    try:
        plain = json.loads((run / "lineage.json").read_text(encoding="utf-8"))
        above = plain["parent"]
        return Member(run, _parent(run, above) if above else None, plain.get("weights"))
    except FileNotFoundError:
        raise Fault(f"{run} is no run folder: it has no lineage.json; name the folder that a run wrote to") from None
    except OSError as error:
        raise Fault(f"{run}/lineage.json cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{run}/lineage.json is damaged ({error!r}); put it back from a copy of the run") from None


def _parent(run: Path, plain: dict[str, Any]) -> Parent:
    return Parent((run / plain["run"]).resolve(), plain["step"], plain["tokens"], plain["learning_rate"])


def ancestry(run: Path) -> list[Member]:
    """The run and its ancestors, eldest last; ends where an ancestor's folder is gone or another run's."""
    members = [read_lineage(run)]
    seen = {run.resolve()}
    while above := members[-1].parent:
        if above.run in seen or not (above.run / "lineage.json").is_file():
            break
        seen.add(above.run)
        members.append(read_lineage(above.run))
    return members
