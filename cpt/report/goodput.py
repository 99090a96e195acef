"""Where the hours of a run went: its wall time by cause, over all attempts, and the share that was training.

    submitted ~ queue ~> started ~ start ~> training ~ steps, evaluations, saves ~> ended ~ down ~> started ...

Times of day come from `attempts.jsonl`, seconds of steps from `metrics.jsonl`, of evaluations from `scores.jsonl`. An
attempt that ended without a word ended, for all that is known, with its last step; what came then is down time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpt.observe.attempts import is_of_started

# Who notes them is no process of the attempt.
_OF_SUPERVISOR = ("submitted", "launched", "restarting", "requeued", "not_requeued", "left")

# In the order in which they are told.
CAUSES = {
    "training": "steps that stand",
    "evaluation": "scores on held-out text",
    "save": "training held up by saves",
    "start": "from the beginning of the first rank's process to its first step",
    "lost": "steps and evaluations that were dropped on a resume or a rewind, steps left out",
    "queue": "waiting for the scheduler, until the first rank's process begins",
    "down": "between the end of an attempt and the next one",
    "other": "what no record tells: between steps, ends of stages, the way to the end after the last step",
}


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by cause, in the order of `CAUSES`; they add up to `wall_seconds`.

    From its first event to its last, or to its last step where it is running or was killed. `attempts`: how many times
    it was started. `lost_steps`: how many steps were made in vain.
    """

    wall_seconds: float
    seconds: dict[str, float]
    attempts: int
    lost_steps: int

    @property
    def share(self) -> float:
        """Training over wall time, from 0 to 1."""
        return self.seconds["training"] / self.wall_seconds if self.wall_seconds else 0.0


def goodput(
    events: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]
) -> Goodput | None:
    """The account of a run from the objects of its three files; None if no start of it was noted.

    Steps and evaluations that were made before the first noted start are left out.
    """
    starts = [index for index, event in enumerate(events) if event["event"] == "started"]
    if not starts:
        return None
    first_step = events[starts[0]].get("step") or 0
    metrics = [line for line in metrics if line["step"] > first_step]
    scores = [line for line in scores if line["step"] >= first_step]
    skipped = [line for line in metrics if line.get("skipped")]
    lost = [event for event in events if event["event"] in ("resumed_over", "rewound")]
    seconds = dict.fromkeys(CAUSES, 0.0)
    seconds["training"] = _total(metrics, "step_seconds") - _total(skipped, "step_seconds")
    seconds["evaluation"] = _total(scores, "evaluation_seconds")
    seconds["save"] = _total(metrics, "save_seconds")
    seconds["save"] += _total([event for event in events if event["event"] == "saved_last"], "seconds")
    seconds["lost"] = _total(lost, "seconds") + _total(skipped, "step_seconds")
    began = end = _began(events[0], events[0]["time"] if starts[0] else -math.inf)
    for place, begin in enumerate(starts):
        stop = starts[place + 1] if place + 1 < len(starts) else len(events)
        start = _began(events[begin], end)
        queue = _seconds_in_queue(events, begin, start, end)
        seconds["queue"] += queue
        seconds["down"] += start - end - queue
        seconds["start"] += _first_step(events[begin:stop], scores) - start
        end = _end(events, begin, stop, metrics, scores)
    seconds["other"] = end - began - sum(seconds.values())
    # Of those left out, some were never made: a rewind passes over them.
    lost_steps = sum(_num_steps(event) for event in lost)
    lost_steps += sum(line.get("tokens_per_second") != 0.0 for line in skipped)
    return Goodput(end - began, seconds, len(starts), lost_steps)


def _began(started: dict[str, Any], end_before: float) -> float:
    """When the first rank's process of an attempt began: some time before it took the folder."""
    return max(end_before, started["time"] - started.get("prepared_seconds", 0.0))


def _seconds_in_queue(events: Sequence[dict[str, Any]], begin: int, start: float, end_before: float) -> float:
    """How long the job of the attempt that begins with that event had been asked for, while nothing ran."""
    asked = None
    for event in reversed(events[:begin]):
        is_of_gap, is_of_job = event["time"] >= end_before, event.get("job") == events[begin].get("job") is not None
        if event["event"] == "started" and is_of_job:
            break
        if event["event"] in ("submitted", "requeued") and (is_of_gap or is_of_job):
            asked = event["time"]
            break
    return max(0.0, start - max(asked, end_before)) if asked is not None else 0.0


def _first_step(attempt: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> float:
    """When the first step of an attempt began, less what is told as evaluation; its last event, if it made none."""
    first = next((event for event in attempt if event["event"] in ("training", "ended")), attempt[-1])
    # Row 0 is scored on the way to step 1.
    is_beginning = first["event"] == "training" and not attempt[0].get("step")
    row_0 = _total([line for line in scores if line["step"] == 0], "evaluation_seconds") if is_beginning else 0.0
    return first["time"] - row_0


def _end(
    events: Sequence[dict[str, Any]],
    begin: int,
    stop: int,
    metrics: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]],
) -> float:
    """When the attempt of the events from `begin` to before `stop` ended: it says so, or its steps do."""
    attempt, next_start = events[begin:stop], events[stop] if stop < len(events) else None
    if ended := [event for event in attempt if is_of_started(event)]:
        return ended[-1]["time"]
    of_run = [event["time"] for event in attempt if event["event"] not in _OF_SUPERVISOR]
    training = next((event["time"] for event in attempt if event["event"] == "training"), None)
    if training is None:
        return of_run[-1]
    first = attempt[0].get("step") or 0
    last = (next_start.get("step") or 0) if next_start else None
    lines = [line for line in [*metrics, *scores] if line["step"] > first and (last is None or line["step"] <= last)]
    made = sum(_total(lines, part) for part in ("step_seconds", "save_seconds", "evaluation_seconds"))
    made += _total([event for event in attempt if event["event"] == "rewound"], "seconds")
    made += _total(_dropped_at(events, stop), "seconds")
    told = [event["time"] for event in attempt if event["event"] in _OF_SUPERVISOR]
    latest = min([*told, *([next_start["time"]] if next_start else [])], default=training + made)
    return max(of_run[-1], min(training + made, latest))


def _dropped_at(events: Sequence[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """What the attempt that begins with that event dropped of the one before."""
    dropped = []
    for event in events[start + 1 :]:
        if event["event"] in ("started", "training", "ended"):
            break
        if event["event"] == "resumed_over":
            dropped.append(event)
    return dropped


def _num_steps(lost: dict[str, Any]) -> int:
    return lost["steps"] if lost["event"] == "resumed_over" else lost["step_from"] - lost["step_to"]


def _total(lines: Sequence[dict[str, Any]], part: str) -> float:
    return sum(line.get(part) or 0.0 for line in lines)
