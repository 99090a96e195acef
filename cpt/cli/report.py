"""What was learned and what was lost in some runs: tables here, and one HTML page with pictures."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from cpt.config import Fault
from cpt.report import (
    comparison_text,
    findings,
    hours_text,
    matrix_text,
    measures_text,
    read_run,
    read_runs,
    runs_text,
)
from cpt.report.as_json import as_plain
from cpt.report.page import check_output, write_report

EXAMPLE = "cpt report runs/base runs/plain runs/replay --output report.html"
WIDTH_ELSEWHERE = 100  # characters, where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the page goes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, finished or running")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="write the page there; without it, tables only"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="FWT against this run's losses before its first step; default: own"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables and writes the page.

    Raises Fault if a run cannot be read or the page cannot be written.
    """
    if arguments.output:
        check_output(arguments.output)
    runs = read_runs(arguments.runs)
    baseline = _losses_before(arguments.baseline) if arguments.baseline else None
    if arguments.output:
        write_report(runs, arguments.output)
    if arguments.json:
        print(json.dumps(as_plain(runs, baseline), indent=1, allow_nan=False))
        return 0
    width = max(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else WIDTH_ELSEWHERE
    tables = [matrix_text(runs[0], width)] if len(runs) == 1 else [comparison_text(runs, width)]
    told = [*tables, measures_text(runs, baseline), hours_text(runs), runs_text(runs), "\n".join(findings(runs))]
    print("\n\n".join(filter(None, told)))
    if arguments.output:
        print(f"\nreport with pictures: {arguments.output.resolve()}")
    return 0


def _losses_before(run: Path) -> dict[str, float]:
    """The held-out losses of a run before its first step. Raises Fault if it was not evaluated then."""
    losses = {source: score.loss for source, score in read_run(run).scores.rows[0].scores.items()}
    if not losses:
        raise Fault(f"--baseline {run}: this run was not evaluated before its first step; name one that was")
    return losses
