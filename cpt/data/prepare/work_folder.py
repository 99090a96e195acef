"""Where a build works until its corpora are whole, and what makes a killed build go on: OUTPUT.partial.

build.lock      held while a build runs, and let go by the system whatever ends it
settings.json   what the build was asked for, and size and time of change of every input file
journal.json    the last checkpoint: replaced in one step, after all it tells of is on the disk
the rest        the work itself; what is newer than the checkpoint is thrown away on the way on
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from cpt.config import Fault
from cpt.data.prepare.aside import DISK_IS_FULL, FILE_TOO_LARGE, make_folder, refuse_used, rename_to

logger = logging.getLogger(__name__)

LOCK, SETTINGS, JOURNAL = "build.lock", "settings.json", "journal.json"


@final
class WorkFolder:
    """The folder of a build under way; get it from `work_folder`.

    journal: the last checkpoint of an earlier run, None if there is none.
    """

    def __init__(self, path: Path, journal: dict[str, Any] | None) -> None:
        self.path = path
        self.journal = journal

    def write_checkpoint(self, content: dict[str, Any]) -> None:
        """Sets down how far the build is. What the content tells of must be on the disk already."""
        for folder, _, _ in os.walk(self.path):
            _sync_folder(folder)
        _replace(self.path / JOURNAL, content)

    def publish(self, parts: dict[Path, Path]) -> None:
        """Renames each finished folder to its output, the last one last, and removes the work folder.

        A part that is gone was renamed before a kill. Raises Fault if an output was taken meanwhile.
        """
        for part, output in parts.items():
            if part.exists():
                rename_to(output, part)
        _sync_folder(self.path.parent)
        self.remove()

    def remove(self) -> None:
        """Removes the folder, the journal late: as long as it is there, a killed removal can go on."""
        if not self.path.exists():
            return
        _empty(self.path, keep=(LOCK, JOURNAL, SETTINGS))
        for name in (JOURNAL, SETTINGS, LOCK):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()


@contextlib.contextmanager
def work_folder(
    outputs: list[Path],
    options: dict[str, Any],
    files: list[str],
    *,
    is_resumable: bool = True,
    is_restarted: bool = False,
) -> Iterator[WorkFolder]:
    """The work folder of the first of the outputs, with the last checkpoint of a build that was asked for the same.

    options: what decides the bytes of the build, as JSON holds it; on_error may change from "stop" to "skip".
    is_restarted: throws away what an earlier build left. is_resumable: without, an error leaves no folder behind.

    The folder stays when the block ends in an error after a checkpoint. Raises Fault if an output is used, if another
    build is at work here, or if what was left was asked for otherwise; OSError, with a way out, if the disk is full.
    """
    path = outputs[0].parent / f"{outputs[0].name}.partial"
    wanted = json.loads(json.dumps({"options": options, "files": {name: _state_of(name) for name in files}}))
    with _locked(path, outputs):
        work = WorkFolder(path, None)
        try:
            journal = None if is_restarted else _read(path / JOURNAL)
            if journal is None or not journal.get("is_finished"):
                for output in outputs:
                    refuse_used(output)
            if journal is None:
                # First of all, so that a kill on the way leaves no checkpoint without its work.
                (path / JOURNAL).unlink(missing_ok=True)
                _empty(path, keep=(LOCK,))
            else:
                _refuse_different(path, _read(path / SETTINGS) or {}, wanted)
                work.journal = journal
            if is_resumable:
                _replace(path / SETTINGS, wanted)
            yield work
        except BaseException as error:
            # Asked of the disk: Ctrl-C may have come just after the checkpoint was set down.
            if not (path / JOURNAL).exists():
                work.remove()
                way_on = "choose another --output"
            else:
                logger.warning("what is done is kept in %s; the same command goes on, --restart begins anew", path)
                way_on = "the same command goes on"
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise OSError(error.errno, f"the disk is full; free some space, then {way_on}", str(path)) from error
            if isinstance(error, OSError) and error.errno == errno.EFBIG:
                raise OSError(error.errno, f"{FILE_TOO_LARGE}, then {way_on}", str(path)) from error
            raise


@contextlib.contextmanager
def _locked(path: Path, outputs: list[Path]) -> Iterator[None]:
    output = outputs[0]
    if path.is_dir() and any(path.iterdir()) and not (path / LOCK).exists():
        raise Fault(f"{path} is in the way and not of a build; move it, or choose another --output")
    for used in outputs:
        if not path.exists():
            refuse_used(used)
    while True:
        make_folder(path, output)
        # Files that Python opens are closed in processes it starts, so workers do not hold the lock.
        try:
            file = (path / LOCK).open("a+")
        except FileNotFoundError:
            # A build that ends at this moment removed the folder.
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                process = file.read().strip() or "of another machine"
                raise Fault(
                    f"another build is writing {output} (process {process}); wait for it or choose another --output"
                ) from error
            if _is_still(path / LOCK, file.fileno()):
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                yield
                return


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the opened file is the one at the path, and not one that was removed meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refuse_different(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = []
    for name, value in now["options"].items():
        was = before.get("options", {}).get(name)
        # What was read without an error would have been read the same by a build that skips errors.
        if was != value and (name, was) != ("on_error", "stop"):
            differences.append(f"{name} was {was!r} and is now {value!r}")
    files_before = before.get("files", {})
    differences += [f"the input {name} is gone" for name in files_before if name not in now["files"]]
    differences += [f"the input {name} is new" for name in now["files"] if name not in files_before]
    differences += [
        f"the input {name} has changed" for name, was in files_before.items() if now["files"].get(name, was) != was
    ]
    if not differences and list(files_before) != list(now["files"]):
        differences.append("the inputs come in another order")
    if differences:
        more = f" (and {len(differences) - 1:,} more)" if len(differences) > 1 else ""
        raise Fault(
            f"{path} holds a build that was begun otherwise: {differences[0]}{more}; "
            "give the command it was begun with to go on, or --restart to begin anew"
        )


def _state_of(name: str) -> list[int]:
    try:
        state = os.stat(name)
    except OSError:
        # The reader tells of files that cannot be read; standard input has no state.
        return []
    return [state.st_size, state.st_mtime_ns]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}); the build cannot go on: begin anew (--restart)") from error


def _replace(path: Path, content: dict[str, Any]) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync_folder(path.parent)


def _sync_folder(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _empty(path: Path, keep: tuple[str, ...]) -> None:
    for child in path.iterdir():
        if child.name in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
