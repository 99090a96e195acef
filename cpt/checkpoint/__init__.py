"""Leaving and coming back, on any number of ranks."""

from cpt.checkpoint.place import Place
from cpt.checkpoint.read import Checkpoint, find_checkpoint
from cpt.checkpoint.run_folder import RunFolder
from cpt.checkpoint.write import set_latest, step_folder, write_checkpoint, write_first

__all__ = [
    "Checkpoint",
    "Place",
    "RunFolder",
    "find_checkpoint",
    "set_latest",
    "step_folder",
    "write_checkpoint",
    "write_first",
]
