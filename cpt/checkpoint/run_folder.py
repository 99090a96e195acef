"""The folder of a run: made once, taken up again after any stop, refused when it is something else."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt.checkpoint.keep import put_by, superseded
from cpt.checkpoint.read import Checkpoint, find_checkpoint
from cpt.checkpoint.write import (
    checkpoint_folders,
    give_names_back,
    has_lost_names,
    set_latest,
    step_folder,
    step_of,
)
from cpt.config import Fault, write_in_place
from cpt.parallel.mesh import ALONE, Mesh
from cpt.parallel.together import together

_log = logging.getLogger(__name__)

FINISHED = "finished.json"
# A file, and no folder: network file systems hand a lock on a file to their server, and keep that on a folder to the
# machine it was taken on. It is never removed: who waits for it would hold one that nobody else looks at.
LOCK = ".lock"
# What a refused run, `cpt submit` and the supervisor leave there before a run begins.
_BEFORE_A_RUN = {"attempts.jsonl", "logs", "snapshot", "stop", LOCK}


class RunFolder:
    """Where one run keeps everything; `path` need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[bool, bool, list[str]] | None = None
        self._unread: list[Path] = []  # later than what `latest` gave
        self._lock: int | None = None  # the open file, as long as this process has taken the folder

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether the run said itself that it is done; no exit status can say so."""
        return (self.path / FINISHED).is_file()

    @property
    def steps_when_finished(self) -> int:
        """Steps of the whole run, once it is finished."""
        return json.loads((self.path / FINISHED).read_text(encoding="utf-8"))["step"]

    @property
    def is_run(self) -> bool:
        """Whether a run was ever begun here."""
        return (self.path / "run.yaml").is_file()

    def refuse_other_contents(self) -> None:
        """Raise Fault if the folder holds something that is not a run."""
        if self.path.exists() and not self.path.is_dir():
            raise Fault(f"output = {self.path}: this is a file; name a folder")
        # What a run that was ended while it made its folder has left there is none of the user's.
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        used = any(not name.endswith(".aside") and name not in _BEFORE_A_RUN for name in names)
        if used and not self.is_run:
            raise Fault(
                f"output = {self.path}: the folder is used, but not by a run (it has no run.yaml); "
                "name another output, or empty it"
            )

    def take_back(self) -> None:
        """Let a checkpoint have its name again that a save had moved away when it was killed.

        Before a run looks for its checkpoints, on one rank. Raises a passing Fault if another process is in the folder,
        which may be just about to do so, and OSError if the disk refuses.
        """
        if has_lost_names(self.checkpoints):
            with self.taken(ALONE):  # which does it
                pass

    def latest(self, mesh: Mesh = ALONE) -> Checkpoint | None:
        """The newest whole checkpoint, the same on all ranks of `mesh`, which all call it; None if none was saved.

        Later ones that the disk does not give are put by when the folder is taken.
        """
        found = find_checkpoint(self.checkpoints, mesh=mesh)
        self._unread = list(found.unread) if found else []
        return found

    @property
    def last_saved(self) -> Path | None:
        """The checkpoint that `latest` names, which is not looked into; None if nothing was saved.

        Raises ValueError if it names none that is there, and OSError if the disk does not give it.
        """
        latest = self.checkpoints / "latest"
        try:
            name = latest.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        folder = self.checkpoints / name
        if folder not in checkpoint_folders(self.checkpoints):  # `latest` has no checksum
            raise ValueError(f"{latest} names no checkpoint that is there")
        return folder

    def look(self, mesh: Mesh) -> tuple[bool, bool]:
        """Whether a run was begun here, and whether it is finished, as the first rank sees it; all ranks call it.

        `taken` then refuses a folder that another process has gone on with meanwhile.
        """
        self._seen = self._state()
        is_run, is_finished = mesh.from_first([int(self.is_run), int(self.is_finished)])
        return bool(is_run), bool(is_finished)

    def _state(self) -> tuple[bool, bool, list[str]]:
        return self.is_run, self.is_finished, [folder.name for folder in checkpoint_folders(self.checkpoints)]

    def make(self) -> None:
        """Make the folder; Fault if that cannot be done. One that was deleted while it is taken is taken again."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Fault(f"output = {self.path}: the folder cannot be made: {error.strerror}") from None
        if self._lock is not None and not (self.path / LOCK).exists():
            self._take()

    @contextmanager
    def taken(self, mesh: Mesh) -> Iterator[None]:
        """Make the folder and keep other processes out of it meanwhile; a Fault, which ends all ranks, if one is in it.

        The lock ends with the process, however that ends. A checkpoint that a killed save had moved away is back.
        """
        try:
            with together(mesh):
                if mesh.is_first:
                    self.make()
                    self._take()
                    give_names_back(self.checkpoints)
                if mesh.is_first and self._seen not in (None, self._state()):
                    told = f"output = {self.path}: another process has gone on with it meanwhile; start again"
                    raise Fault(told, is_passing=True)
                if mesh.is_first:
                    self._put_by_unread()
            yield
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _put_by_unread(self) -> None:
        """So that they neither go, nor are gone on from when this run has dropped the lines of their steps."""
        for folder in self._unread:
            told = "%s could not be read and may be whole: it is kept as %s until this run has come as far"
            _log.warning(told, folder, put_by(folder).name)
        self._unread = []

    def _take(self) -> None:
        file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what may be written
        if _is_taken(file):
            os.close(file)
            told = f"output = {self.path}: another process is training there; wait for it, or stop it first"
            raise Fault(told, is_passing=True)
        before, self._lock = self._lock, file
        if before is not None:
            os.close(before)

    def keep_newest(self, newest: Path, number: int) -> None:
        """Let `latest` name `newest`, which was just saved; remove what it supersedes: the `number` last ones stay.

        What cannot be removed is told and stays: the new one stands all the same.
        """
        set_latest(self.checkpoints, newest)
        killed = self.checkpoints.glob(".step-*.aside")  # saves that were
        for folder in [*superseded(self.checkpoints, newest, number), *killed]:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                _log.warning("%s cannot be removed: %s", error.filename or folder, error.strerror)

    def forget_after(self, checkpoint: Path) -> None:
        """Let `latest` name `checkpoint`, and remove those of later steps; raises OSError if that cannot be done."""
        give_names_back(self.checkpoints)  # or one of a later step would come back
        for folder in checkpoint_folders(self.checkpoints):
            if step_of(folder) > step_of(checkpoint):
                shutil.rmtree(folder)
        set_latest(self.checkpoints, checkpoint)

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies, or will lie."""
        return step_folder(self.checkpoints, step)

    def finish(self, step: int, tokens: int) -> None:
        """Mark the run as done."""
        self.write_json(FINISHED, {"step": step, "tokens": tokens, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def write_json(self, name: str, plain: dict[str, Any]) -> None:
        """Write one of the folder's small files aside, then in place."""
        write_in_place(self.path / name, json.dumps(plain, indent=1) + "\n")


def _is_taken(file: int) -> bool:
    """Take the lock on an open file; True if somebody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:  # some network file systems lock nothing
        _log.info("the run's folder cannot be locked (%s): see to it that no two jobs write to it", error.strerror)
    return False
