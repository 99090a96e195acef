"""What a job runs from: a copy of the code and the settings in full, so that edits after its submission change nothing.

RUN/snapshot/0001/launcher/  cpt/  kernels/     as in a checkout
                  config.yaml                   the settings
                  job.sbatch                    what was submitted
"""

from __future__ import annotations

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

    Nothing is left of it if that fails.
    """
    root = code_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    try:
        for shelf in _SHELVES:
            shutil.copytree(root / shelf, folder / shelf, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
