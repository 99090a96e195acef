"""The folders of the runs that one command trains, mostly one, as whoever looks after them sees them; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpt.observe.attempts import read_attempts

# cpt.checkpoint and the ranks know these too; to import those would take torch, and so seconds.
FINISHED_FILE, STOP_FILE = "finished.json", "stop"


class RunFolders:
    """What stands in the folders of one run, or of those of a version plan; none of them need be there yet."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = list(runs)

    def are_finished(self) -> bool:
        """Whether each says itself that it is done."""
        return all((run / FINISHED_FILE).is_file() for run in self._runs)

    def newest_step(self) -> int:
        """Of the newest checkpoint, counted over all runs: it grows with what is done."""
        return sum(newest_step(run) for run in self._runs)

    def num_told(self) -> list[int]:
        """How many events each has noted so far."""
        return [len(read_attempts(run)) for run in self._runs]

    def events(self, after: Sequence[int] = ()) -> list[dict[str, Any]]:
        """What was noted, in the order of time; `after` so many events of each run.

        All that a run has where there are fewer: somebody deleted its folder meanwhile, and it began a new file.
        """
        told = [read_attempts(run) for run in self._runs]
        starts = after or [0] * len(told)
        since = ((events, start if start <= len(events) else 0) for events, start in zip(told, starts, strict=True))
        events = [event for events, start in since for event in events[start:]]
        return sorted(events, key=lambda event: event["time"]) if len(told) > 1 else events

    def end_after(self, after: Sequence[int]) -> dict[str, Any] | None:
        """The `ended` that was noted after so many events, and after which nothing was started; None if none was."""
        told = [event for event in self.events(after) if event["event"] in ("started", "ended")]
        return told[-1] if told and told[-1]["event"] == "ended" else None

    def have_stop_file(self) -> bool:
        """Whether somebody asks by file to stop."""
        return any((run / STOP_FILE).exists() for run in self._runs)

    def put_stop_file(self) -> None:
        """Ask by file to stop. Where the disk refuses it is not asked: what does not end is killed."""
        for run in self._runs:
            with suppress(OSError):  # a run of a plan may not have begun either
                (run / STOP_FILE).touch()

    def remove_stop_file(self) -> None:
        """Ask no more."""
        for run in self._runs:
            with suppress(OSError):
                (run / STOP_FILE).unlink(missing_ok=True)


def newest_step(run: Path) -> int:
    """The step of the checkpoint that the run would go on from, by its name alone; 0 if there is none."""
    try:
        return int((run / "checkpoints" / "latest").read_text(encoding="utf-8").strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0
