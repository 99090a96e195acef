"""What was learned and what was lost in some runs: tables here, and one HTML page with pictures."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from cpt.report import comparison_text, findings, matrix_text, read_runs, runs_text
from cpt.report.page import check_output, write_report

EXAMPLE = "cpt report runs/base runs/plain runs/replay --output report.html"
WIDTH_ELSEWHERE = 100  # characters, where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the page goes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, finished or running")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="write the page there; without it, tables only"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables and writes the page.

    Raises Fault if a run cannot be read or the page cannot be written.
    """
    if arguments.output:
        check_output(arguments.output)
    runs = read_runs(arguments.runs)
    width = max(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else WIDTH_ELSEWHERE
    tables = [matrix_text(runs[0], width)] if len(runs) == 1 else [comparison_text(runs, width)]
    print("\n\n".join([*tables, runs_text(runs), "\n".join(findings(runs))]))
    if arguments.output:
        write_report(runs, arguments.output)
        print(f"\nreport with pictures: {arguments.output.resolve()}")
    return 0
