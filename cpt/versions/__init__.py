"""A version plan: one main path through the data of all versions, and a branch off it for the release of each."""

from cpt.versions.reading import Versions, read_versions
from cpt.versions.running import train_versions
from cpt.versions.telling import plan_lines_of_versions

__all__ = ["Versions", "plan_lines_of_versions", "read_versions", "train_versions"]
