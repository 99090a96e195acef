"""A run before its first step: settings.py, reading.py (files, words), branching.py, stages.py (data), beginning.py,
opening.py; and what the loop calls: scoring.py, saving.py.
"""

from cpt.run.branching import branch_of
from cpt.run.reading import differences, in_full, model_after, read_run, run_of, stages_trained
from cpt.run.settings import Run, Stage

__all__ = [
    "Run",
    "Stage",
    "branch_of",
    "differences",
    "in_full",
    "model_after",
    "read_run",
    "run_of",
    "stages_trained",
]
