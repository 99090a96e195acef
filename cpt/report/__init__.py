"""What a run says to a person: tables for the terminal, and one HTML page with pictures."""

from cpt.report.hours import hours_text
from cpt.report.measures import measures_text
from cpt.report.runs import Parent, RunRecord, StepRecord, read_run, read_runs
from cpt.report.tables import comparison_text, findings, matrix_text, runs_text

__all__ = [
    "Parent",
    "RunRecord",
    "StepRecord",
    "comparison_text",
    "findings",
    "hours_text",
    "matrix_text",
    "measures_text",
    "read_run",
    "read_runs",
    "runs_text",
]
