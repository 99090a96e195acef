"""The settings of a branch: a child that leaves a path as it is there, decays over its own tokens, and is a release.

Everything is the path's, moments included, but for the schedule, the length and where it is written. Its windows are
the ones that the path takes (or took) next itself, or such as nobody in the lineage has read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt.methods import new_rows_first
from cpt.run.reading import model_after, stages_trained

# What a path began with; a branch begins from a checkpoint of the path, and of that alone.
_OF_THE_START = ("weights", "growth")


def branch_of(
    path: Path,
    above: Mapping[str, Any],
    progress: Mapping[str, int],
    output: Path,
    tokens: int,
    schedule: Mapping[str, Any],
    *,
    continues: bool,
) -> dict[str, Any]:
    """The mapping of settings of a branch that leaves `path`, a run with the settings `above`, at `progress`.

    `tokens`: of all windows, replayed ones included. `continues`: it sees the windows that the path takes next.
    """
    stages = above["stages"]
    stage = stages[min(progress["stage"], len(stages) - 1)]
    named = {"name": stage["name"], "tokens": tokens, "sources": stage["sources"], "schedule": dict(schedule)}
    replay = stage.get("replay")
    if replay:
        # Its tokens are all tokens. A ramp, which counts from where its stage began, has been gone up already.
        replay = {**replay, "accounting": "replaces_new", "ramp": replay.get("ramp") if continues else None}
    waiting = new_rows_first.__name__.rsplit(".", 1)[-1]  # a method for the first tokens after a start from weights
    return {
        **{key: value for key, value in above.items() if key not in _OF_THE_START},
        "output": str(output),
        "parent": {"run": str(path), "at": str(progress["step"])},
        "optimizer_state": "keep",
        "model": model_after(dict(above), stages_trained(progress)),
        "methods": [method for method in above.get("methods") or [] if method["name"] != waiting],
        "stages": [{**named, "replay": replay, "continues": continues}],
    }
