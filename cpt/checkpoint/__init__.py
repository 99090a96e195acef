"""Leaving and coming back, on any number of ranks."""

from cpt.checkpoint import keep
from cpt.checkpoint.place import Place
from cpt.checkpoint.read import Checkpoint, find_checkpoint
from cpt.checkpoint.run_folder import RunFolder
from cpt.checkpoint.save import Ended, Saver, write_checkpoint
from cpt.checkpoint.write import Content, set_latest, step_folder, write_first

__all__ = [
    "Checkpoint",
    "Content",
    "Ended",
    "Place",
    "RunFolder",
    "Saver",
    "find_checkpoint",
    "keep",
    "set_latest",
    "step_folder",
    "write_checkpoint",
    "write_first",
]
