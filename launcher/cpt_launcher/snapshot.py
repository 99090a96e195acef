"""What a job runs from: a copy of the code and the settings in full, so that edits after its submission change nothing.

RUN/snapshot/0001/launcher/  cpt/  kernels/     as in a checkout
                  config.yaml                   the settings
                  job.sbatch                    what was submitted
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cpt
from cpt.config import Fault

_SHELVES = ("launcher", "cpt", "kernels")


def code_folder() -> Path:
    """The checkout that this code runs from. Raises Fault if it was installed without one."""
    root = Path(cpt.__file__).resolve().parents[1]
    missing = [name for name in ("launcher/run.py", "launcher/supervise.py", "kernels") if not (root / name).exists()]
    if missing:
        raise Fault(
            f"{root} has no {missing[0]}: a job runs from a copy of a checkout, and this cpt was installed without "
            "one; install it with pip install -e ., or go into a checkout: python -m cpt.cli submit"
        )
    return root


def next_snapshot(run: Path) -> Path:
    """Where the next one lies: `RUN/snapshot/0001`, and so on."""
    there = [int(path.name) for path in (run / "snapshot").glob("[0-9]*") if path.name.isdigit()]
    return run / "snapshot" / f"{max(there, default=0) + 1:04d}"


@contextmanager
def snapshot(folder: Path) -> Iterator[Path]:
    """Copy the code into the new `folder`; what is inside adds settings and script, and submits.

    Nobody but the owner may change any of it. Nothing is left of it if that fails.
    """
    root = code_folder()
    with _writable_by_owner_only() as mode:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        try:
            for shelf in _SHELVES:
                _copy(root / shelf, folder / shelf, mode)
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _writable_by_owner_only() -> Iterator[int]:
    """The mode of folders, while the umask keeps others from writing to what is made: who may write runs code as us."""
    before = os.umask(0o077)
    mask = before | 0o022
    os.umask(mask)
    try:
        yield 0o777 & ~mask
    finally:
        os.umask(before)


def _copy(source: Path, target: Path, mode: int) -> None:
    """Copy a folder's files, but not their modes, without what was compiled and what is hidden."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(source, target, ignore=ignored, copy_function=shutil.copyfile)
    for path in (target, *target.rglob("*")):
        if path.is_dir():  # copytree gives folders the modes that they had, whatever the umask
            path.chmod(mode)
