"""The runs of a plan one after another: the main path first, then each version's branch.

Whatever stopped it, the same command goes on: a run that is finished says so and is left alone, the one that was
stopped is taken up from its newest checkpoint, and what follows has not begun.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
import signal
from collections.abc import Callable

from cpt.checkpoint import RunFolder
from cpt.checkpoint.write import checkpoint_folders
from cpt.parallel.mesh import Mesh
from cpt.train import Outcome, train
from cpt.versions.reading import Release, Versions

_log = logging.getLogger(__name__)


def train_versions(
    plan: Versions, mesh: Mesh, why_orphaned: Callable[[], str | None] = lambda: None, job: str | None = None
) -> Outcome:
    """Train main path and branches to their end, or until a signal asks to stop; on all ranks alike.

    Raises what `train` does. A checkpoint that only a branch needed goes when the branch is done.
    """
    _log.info("main path through %d versions: %s", len(plan.releases), plan.main.output)
    outcome = train(plan.main, mesh, why_orphaned, job)
    for release in plan.releases:
        # A signal in a run's last step ends that run as if there had been none, and may have reached one rank alone.
        if mesh.any(outcome.asked is not None):
            return dataclasses.replace(outcome, signal=outcome.signal or outcome.asked or signal.SIGTERM)
        gc.collect()  # engines hold themselves in circles; the next one wants the memory
        _log.info("version %s: %s", release.name, release.run.output)
        outcome = train(release.run, mesh, why_orphaned, job)
        if mesh.is_first and RunFolder(release.run.output).is_finished:
            _let_go(plan, release)
    return outcome


def _let_go(plan: Versions, release: Release) -> None:
    """Remove the checkpoint that a finished branch left, unless the path keeps it for other reasons."""
    folder = RunFolder(plan.main.output).checkpoint_at(release.place.step)
    among_last = checkpoint_folders(folder.parent)[-plan.kept.keep_last :]
    if folder in among_last or plan.kept.keeps_for_ever(release.place):
        return
    aside = folder.with_name(f".{folder.name}.aside")  # never half a checkpoint under its name
    if folder.is_dir():
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
