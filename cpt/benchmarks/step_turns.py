"""Ways of making a step that take turns, as many at once as the memory holds."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from cpt.benchmarks.step_process import PROFILED_NAME, Failed, StepProcess
from cpt.benchmarks.step_ways import Case

_log = logging.getLogger(__name__)
YARDSTICK = "transformers"
WARM_STEPS = 2


def groups_that_fit(ways: list[str], state: float, memory: int | None) -> list[list[str]]:
    """Ways whose memory lasts for all of them at once; each group with the one that they are compared with."""
    others = [way for way in ways if way != YARDSTICK]
    yardstick = [way for way in ways if way == YARDSTICK]
    # A guess of what is kept for the backward pass, logits above all.
    at_once = len(ways) if memory is None else max(2, int(0.9 * memory / (1.6 * state + 8 * 2**30)))
    rest = max(1, at_once - len(yardstick))
    return [yardstick + others[i : i + rest] for i in range(0, max(len(ways[:1]), len(others)), rest)]


@dataclass(frozen=True)
class Taken:
    """What came of the steps of one way: seconds in each turn, and the turns of the yardstick beside it."""

    seconds: list[float]
    of_yardstick: list[float] | None
    first_loss: float
    peak_bytes: int
    why_not: str | None = None


def in_turns(name: str, case: Case, ways: list[str], repetitions: int, device: torch.device) -> dict[str, Taken]:
    """Every way's steps, one of each in a turn. A way that fails takes no part any more."""
    processes: dict[str, StepProcess] = {}
    failed: dict[str, Taken] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, float] = {}
    try:
        for way in ways:
            processes[way] = StepProcess(way, case, device)
        turns = 1 + WARM_STEPS + repetitions
        with tqdm(total=turns, unit="turn", desc=name, disable=not sys.stderr.isatty()) as bar:
            for turn in range(turns):
                for way in [way for way in ways if way not in failed]:
                    try:
                        answer = processes[way].ask("step") if turn else processes[way].answer()
                    except Failed as error:
                        _log.warning("%s, %s: %s", name, way, error)
                        failed[way] = Taken([], None, 0.0, 0, f"failed: {str(error)[:120]}".replace("|", "/"))
                        continue
                    if turn:
                        losses.setdefault(way, answer["loss"])
                    if turn > WARM_STEPS:
                        seconds[way].append(answer["seconds"])
                bar.update()
        yardstick = seconds[YARDSTICK] if YARDSTICK in ways and YARDSTICK not in failed else None
        return failed | {
            way: Taken(seconds[way], yardstick, losses[way], processes[way].ask("memory")["peak_bytes"])
            for way in ways
            if way not in failed
        }
    finally:
        for process in processes.values():
            process.close()


def groups_of_a_step(case: Case, device: torch.device) -> dict[str, float]:
    """Seconds of one of our steps by what they were spent on; nothing if it could not be looked into."""
    process = StepProcess(PROFILED_NAME, case, device)
    try:
        process.answer()
        return process.ask("profile")["groups"]
    except Failed as error:
        _log.warning("the step could not be looked into: %s", error)
        return {}
    finally:
        process.close()
