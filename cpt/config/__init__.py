"""Settings: YAML and key=value in, frozen dataclasses out, every fault told at once."""

from cpt.config.choices import beside, build, chosen_from, name_of_choice, names_of_choices
from cpt.config.faults import Fault
from cpt.config.length import Length, faults_of_lengths
from cpt.config.pairs import as_pairs
from cpt.config.read import as_mapping, read_mapping, read_settings
from cpt.config.write import write_in_place, write_yaml

__all__ = [
    "Fault",
    "Length",
    "as_mapping",
    "as_pairs",
    "beside",
    "build",
    "chosen_from",
    "faults_of_lengths",
    "name_of_choice",
    "names_of_choices",
    "read_mapping",
    "read_settings",
    "write_in_place",
    "write_yaml",
]
