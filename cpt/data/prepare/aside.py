"""Folders appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cpt.config import Fault

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
FILE_TOO_LARGE = "a file would grow larger than the file system or a limit (ulimit -f) allows; raise the limit"


@contextlib.contextmanager
def written_aside(output: str | Path) -> Iterator[Path]:
    """Gives a new folder beside `output` to write into, and renames it to `output` when the block ends well.

    When the block ends in an error or by Ctrl-C, the new folder is removed. Folders above `output` are made.
    Raises Fault if `output` is there already and not an empty folder, before or after, if the disk is full, or if a
    file gets too large for it.
    """
    output = Path(output)
    refuse_used(output)
    # Beside it, so that it is on the same disk and the rename is one step. The random ending keeps two builds apart.
    aside = output.parent / f"{output.name}.partial-{secrets.token_hex(4)}"
    make_folder(aside, output)
    try:
        yield aside
        rename_to(output, aside)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise Fault(f"the disk of {output.parent} is full; free some space or choose another --output") from error
        if error.errno == errno.EFBIG:
            raise Fault(f"{output}: {FILE_TOO_LARGE} or choose another --output") from error
        raise
    finally:
        # After the rename there is nothing left to remove.
        shutil.rmtree(aside, ignore_errors=True)


def make_folder(folder: Path, output: Path) -> None:
    """Makes a folder to write `output` in, if it is not there; raises Fault if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"cannot write to {output.parent}: {error.strerror}; choose another --output") from error


def rename_to(output: Path, aside: Path) -> None:
    """Gives the finished folder its name; raises Fault if the name was taken meanwhile or the disk refuses."""
    try:
        os.rename(aside, output)
    except OSError as error:
        refuse_used(output)
        raise Fault(f"cannot rename {aside} to {output}: {error.strerror}; choose another --output") from error


def refuse_used(output: Path) -> None:
    """Raises Fault if `output` is there already and not an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise Fault(f"{output} is there already; choose another --output or remove it")
