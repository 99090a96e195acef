"""Show what a run would do, without training: steps, tokens and epochs by source, learning rate, memory, disk."""

from __future__ import annotations

import argparse

from cpt.planning.plan import plan_lines
from cpt.run import read_run
from cpt.versions import plan_lines_of_versions, read_versions

EXAMPLE = "cpt plan configs/quickstart/replay.yaml --ranks 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt plan`."""
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value", help="YAML files, then key=value words")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to cut the run over; default: 1")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; status 2 with every reason if it cannot work."""
    versions = read_versions(arguments.settings)
    if versions:
        lines = plan_lines_of_versions(versions, arguments.ranks)
    else:
        lines = plan_lines(read_run(arguments.settings), arguments.ranks)
    for line in list(lines):
        print(line)
    return 0
