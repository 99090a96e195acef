"""Read by every Python of a job (the tests put this folder on PYTHONPATH): makes runs slow, and one rank hang.

CPT_TEST_STEP_SECONDS   rest after each step, so that a run of few steps is still there when a fault comes; costs
                        no processor time, which the machines of tests have little of
CPT_TEST_HANG           `RANK STEP FILE`: that rank stops reading data before that step, once: if there is no FILE
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


def slow_down(journal) -> None:
    seconds = float(os.environ["CPT_TEST_STEP_SECONDS"])
    tell = journal.Journal.step

    def tell_and_rest(self, record, num_tokens):
        tell(self, record, num_tokens)
        time.sleep(seconds)

    journal.Journal.step = tell_and_rest


def hang(loader) -> None:
    rank, step, file = os.environ["CPT_TEST_HANG"].split(maxsplit=2)
    batch = loader.Loader.batch
    calls = 0

    def batch_or_hang(self, *words, **named):
        nonlocal calls
        calls += 1
        mine = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if mine == rank and calls == int(step) and not Path(file).exists():
            Path(file).touch()
            time.sleep(3600)
        return batch(self, *words, **named)

    loader.Loader.batch = batch_or_hang


CHANGES = {
    variable: change
    for variable, change in {
        "CPT_TEST_STEP_SECONDS": ("cpt.observe.journal", slow_down),
        "CPT_TEST_HANG": ("cpt.data.loader", hang),
    }.items()
    if os.environ.get(variable)
}


class Changing(importlib.abc.MetaPathFinder):
    """Changes a module right after it is loaded: to load it here would load torch in every Python."""

    def find_spec(self, name, path=None, target=None):
        changes = [change for module, change in CHANGES.values() if module == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if changes else None
        if spec:
            load = spec.loader.exec_module

            def load_and_change(module):
                load(module)
                for change in changes:
                    change(module)

            spec.loader.exec_module = load_and_change
        return spec


if CHANGES:
    sys.meta_path.insert(0, Changing())
