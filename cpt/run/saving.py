"""When a run saves, and what becomes of a save that fails: the run goes on from it, unless it was the last one.

after each step:   due by tokens, by the clock of the first rank, at a stage's end, or asked to stop?
                   copy, and go on; or, for what must stand before the run ends, wait
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cpt.checkpoint import Content, Ended, Place, RunFolder, Saver, keep
from cpt.checkpoint.settings import Settings
from cpt.checkpoint.write import step_of
from cpt.lineage.ledger import Ledger
from cpt.observe.attempts import note_attempt
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress

_log = logging.getLogger(__name__)


class Saving:
    """The saves of one run. `content(state)` gives what a checkpoint holds now, as views; every rank has its own.

    `settle_lines()` writes the lines of the steps so far, which a checkpoint must not be without; OSError if it cannot.

    Every method but `is_asked_by_clock` and `close` is collective.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: Mesh,
        folder: RunFolder,
        content: Callable[[dict[str, Any]], Content],
        settle_lines: Callable[[], None] = lambda: None,
    ) -> None:
        self._settle_lines = settle_lines
        self._settings, self._mesh, self._folder, self._content = settings, mesh, folder, content
        self._saver = Saver(mesh)
        self._began = time.monotonic()  # of the last save, of any kind
        self._num_failed = self._num_in_a_row = 0
        self._last_failure = ""
        self._has_saved = (folder.checkpoints / "latest").is_file()
        self._num_told = 0
        self._seconds = 0.0  # that training has waited for saves, and no record has told

    def close(self) -> None:
        """Return when this rank writes no more."""
        self._saver.close()

    def warn_of_little_room(self, num_bytes: int) -> None:
        """Warn if the disk cannot take what is to be kept and one checkpoint more, of `num_bytes` each."""
        keep_last = self._settings.keep_last
        if self._mesh.is_first and (short := keep.bytes_short(self._folder.checkpoints, num_bytes, keep_last)):
            _log.warning(
                "%s: the disk lacks %.1f GB for %d checkpoints of %.1f GB and one more while it is written; "
                "saves will fail when it is full",
                self._folder.checkpoints, short / 1e9, keep_last, num_bytes / 1e9,
            )  # fmt: skip

    def is_due(self, progress: Progress) -> bool:
        """Whether the last step passed a multiple of `every_tokens`, or one is kept for ever there."""
        return progress.crosses(self._settings.every_tokens) or self._is_for_ever(progress)

    def is_asked_by_clock(self) -> bool:
        """Whether this rank's clock asks for a temporary checkpoint; the first rank's alone counts."""
        minutes = self._settings.temporary_every_minutes
        if minutes is None or not self._mesh.is_first or self._saver.is_pending:
            return False
        return time.monotonic() - self._began >= 60 * minutes

    def poll(self) -> None:
        """Learn whether the save that is on its way has ended; once a step."""
        self._tell(self._saver.poll())

    def wait(self) -> None:
        """Return when no save is on its way."""
        self._tell(self._saver.wait())

    def way_on(self) -> str:
        """What a user can do after a step that the run does not get over."""
        self.wait()  # the checkpoint that is named below may still be on its way
        run, child = self._folder.path, "in a child run with a lower learning rate"
        try:
            last = self._folder.last_saved
        except (OSError, ValueError) as error:  # what the run ends for is to be told all the same
            return f"{error}; see which are whole (cpt checkpoint verify {run}), and go on from one {child}"
        if last is None:
            return "Nothing was saved before; begin again in another output, with a lower learning rate"
        step = step_of(last)
        parent = f"parent: {{run: {run}, at: {step}}}"
        return f"The last checkpoint saved is that of step {step}; go on from it {child}: {parent}"

    def news(self) -> dict[str, int | float]:
        """For the next line of `metrics.jsonl`: how long saves have held up training since the last one, if they did;
        how many have failed, if that has become more.
        """
        news: dict[str, int | float] = {}
        if self._seconds:
            news["save_seconds"], self._seconds = round(self._seconds, 6), 0.0
        if self._num_failed != self._num_told:
            news["checkpoint_failed"] = self._num_told = self._num_failed
        return news

    def save(self, place: Place, ledger: Ledger, *, is_temporary: bool = False) -> None:
        """Save at `place`: in the background if the settings say so, after the save before has ended.

        Raises OSError on every rank if that fails and nothing was to be in the background, or too many have failed.
        """
        with self._holding_up():
            if not self._settings.in_background:
                if failure := self._save_now(place, ledger, is_temporary):
                    raise OSError(failure)
                return
            self.wait()
            began = time.perf_counter()
            failure = self._tell(self._begin(place, ledger, is_temporary, copies=True))
            seconds = time.perf_counter() - began
        if self._num_in_a_row >= self._settings.most_failures:
            raise OSError(
                f"{self._num_in_a_row} saves have failed one after another (checkpoint.most_failures); the last one: "
                f"{self._last_failure}. Mend the disk, and start the same command again"
            )
        if not failure:
            _log.info("copied step %d in %.2f s; writing it in the background", place.progress.step, seconds)

    def save_last(self, place: Place, ledger: Ledger) -> None:
        """Save at `place`, after which the run ends: return when the checkpoint stands.

        What fails is tried once more. Raises OSError on every rank if that fails too.
        """
        with self._holding_up():
            failure = self._save_now(place, ledger) and self._save_now(place, ledger)
        if self._mesh.is_first:  # no step follows whose record could tell it
            note_attempt(self._folder.path, "saved_last", step=place.progress.step, seconds=round(self._seconds, 3))
        self._seconds = 0.0
        if failure:
            raise OSError(failure)

    def settle(self, place: Place, ledger: Ledger) -> None:
        """What follows a save at `place`, on the first rank: `latest` and `ledger.json` speak of it, older ones go."""
        target = self._folder.checkpoint_at(place.progress.step)
        self._folder.keep_newest(target, self._settings.keep_last)
        self._folder.write_json("ledger.json", ledger.as_json())

    @contextmanager
    def _holding_up(self) -> Iterator[None]:
        """What happens inside holds up training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - began

    def _save_now(self, place: Place, ledger: Ledger, is_temporary: bool = False) -> str | None:
        """Save while training waits; why it failed, if it did."""
        self.wait()
        ended = self._begin(place, ledger, is_temporary, copies=False) or self._saver.wait()
        return self._tell(ended)

    def _begin(self, place: Place, ledger: Ledger, is_temporary: bool, copies: bool) -> Ended | None:
        self._began = time.monotonic()
        mark = keep.TEMPORARY if is_temporary else keep.FOR_EVER if self._is_for_ever(place.progress) else None
        content = self._content(keep.marked(place.as_json(ledger), mark))
        target = self._folder.checkpoint_at(place.progress.step)
        if self._mesh.is_first and self._has_saved and self._folder.is_run and not self._folder.checkpoints.is_dir():
            _log.warning("%s was deleted, and all that was saved: saving anew", self._folder.checkpoints)
        then, before = (lambda: self.settle(place, ledger)), self._settle_lines
        return self._saver.begin(target, content, then, copies=copies, before=before)

    def _is_for_ever(self, progress: Progress) -> bool:
        return self._settings.keeps_for_ever(progress)

    def _tell(self, ended: Ended | None) -> str | None:
        """Tell how a save has ended; the failure, if it has failed."""
        if ended is None:
            return None
        if ended.failure is None:
            self._num_in_a_row, self._has_saved = 0, True
            _log.info("saved %s in %.1f s", ended.folder, ended.seconds)
            return None
        self._num_failed += 1
        self._num_in_a_row += 1
        told = f"{ended.folder} could not be written: {ended.failure}; of the checkpoints before, {self._standing()}"
        if ended.is_there:
            told = f"{ended.folder} is written, but latest, older checkpoints or ledger.json are not: {ended.failure}"
        if self._mesh.is_first:
            _log.error("%s", told)
        self._last_failure = told
        return told

    def _standing(self) -> str:
        """Which checkpoint there is to go on from."""
        try:
            last = self._folder.last_saved
        except OSError as error:  # the disk that the save has failed on
            return f"none can be read: {error.strerror}"
        except ValueError as error:
            return str(error)
        return f"{last.name} stands" if last else "none stands so far"
