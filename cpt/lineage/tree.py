"""Who descends from whom: `lineage.json` of each run folder names its parent, and so on up."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cpt.config import Fault, write_in_place

_log = logging.getLogger(__name__)


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


class Kin(NamedTuple):
    """One run of the tree with its children, in the order in which they left it."""

    member: Member
    children: list[Kin]


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
    write_in_place(run / "lineage.json", json.dumps(plain, indent=1) + "\n")


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


def families(runs: Sequence[Path]) -> list[Kin]:
    """The trees that these runs stand in, from the eldest ancestors that are there down to all children that are found.

    Children are looked for beside every run that is known, those found included; what lies there and is no run, or a
    damaged one, is passed by. Raises Fault if one of `runs` is no run.
    """
    members = {member.run.resolve(): member for run in runs for member in reversed(ancestry(run))}
    members.update({run.resolve(): read_lineage(run) for run in runs})  # under the names that they were given
    looked_through: set[Path] = set()
    while beside := {run.parent for run in members} - looked_through:
        looked_through |= beside
        strangers = {member.run.resolve(): member for folder in sorted(beside) for member in _runs_in(folder)}
        while found := {
            run: member
            for run, member in strangers.items()
            if run not in members and member.parent and member.parent.run in members
        }:
            members.update(found)
    children = {run: [] for run in members}
    eldest = []
    for run, member in members.items():
        above = member.parent and member.parent.run
        is_below = above in members and run not in _line_above(above, members)
        (children[above] if is_below else eldest).append(run)
    return [_kin(run, members, children) for run in eldest]


def _runs_in(folder: Path) -> list[Member]:
    """The runs that lie in a folder and can be read."""
    found = []
    for path in sorted(folder.glob("*/lineage.json")):
        try:
            found.append(read_lineage(path.parent))
        except Fault as fault:
            _log.warning("%s; passed by", fault)
    return found


def _line_above(run: Path, members: dict[Path, Member]) -> list[Path]:
    """The run and its ancestors, as far as they are known; ends where one would come again."""
    line = [run]
    while (above := members[line[-1]].parent) and above.run in members and above.run not in line:
        line.append(above.run)
    return line


def _kin(run: Path, members: dict[Path, Member], children: dict[Path, list[Path]]) -> Kin:
    below = sorted(children[run], key=lambda child: (members[child].parent.step, child))
    return Kin(members[run], [_kin(child, members, children) for child in below])
