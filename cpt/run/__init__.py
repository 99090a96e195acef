"""A run before its first step: settings.py, reading.py (files and words), stages.py (what they draw), beginning.py."""

from cpt.run.reading import differences, in_full, model_after, read_run, stages_trained
from cpt.run.settings import Run, Stage

__all__ = ["Run", "Stage", "differences", "in_full", "model_after", "read_run", "stages_trained"]
