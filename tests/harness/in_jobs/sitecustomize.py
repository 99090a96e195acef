"""Read by every Python of a job (the tests put this folder on PYTHONPATH): makes runs slow, and one rank hang.

    CPT_TEST_SLOW    `SECONDS FILE`: rest after each step as long as the file is there, so that a run is still going
                     when a fault comes; a rest costs no processor time, which the machines of tests have little of
    CPT_TEST_HANG    a file: the rank whose number stands in it takes it away and stops reading data

A rank has one thread, as in the forked runs that these are compared with: the same sums, bit for bit.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path


def slow_down(journal) -> None:
    if "CPT_TEST_SLOW" not in os.environ:
        return
    seconds, file = os.environ["CPT_TEST_SLOW"].split(maxsplit=1)
    tell = journal.Journal.step

    def tell_and_rest(self, record, num_tokens):
        tell(self, record, num_tokens)
        if Path(file).exists():
            time.sleep(float(seconds))

    journal.Journal.step = tell_and_rest


def hang(loader) -> None:
    if "CPT_TEST_HANG" not in os.environ:
        return
    file = Path(os.environ["CPT_TEST_HANG"])
    batch = loader.Loader.batch

    def batch_or_hang(self, *words, **named):
        if file.exists() and file.read_text() == os.environ.get("SLURM_PROCID"):
            file.unlink()
            time.sleep(3600)
        return batch(self, *words, **named)

    loader.Loader.batch = batch_or_hang


def take_one_thread(mesh) -> None:
    mesh.threads_for = lambda local_size: 1


CHANGES = {"cpt.observe.journal": slow_down, "cpt.data.loader": hang, "cpt.parallel.mesh": take_one_thread}


class Changing(importlib.abc.MetaPathFinder):
    """Changes a module right after it is loaded: to load it here would load torch in every Python."""

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in CHANGES else None
        if spec:
            load = spec.loader.exec_module

            def load_and_change(module):
                load(module)
                CHANGES[name](module)

            spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, Changing())
