"""Where the hours of each run went, as a table and as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from cpt.observe.speed import as_duration
from cpt.report.goodput import CAUSES, Goodput
from cpt.report.runs import RunRecord
from cpt.report.tables import Table, as_text


def hours_table(runs: Sequence[RunRecord]) -> Table | None:
    """Wall time of each run by cause, a column a run; None if no run has noted its starts."""
    told = [run for run in runs if run.goodput]
    if not told:
        return None
    rows = [(cause, *(_cell(run.goodput, cause) for run in told)) for cause in CAUSES]
    rows.append(("wall time", *(as_duration(run.goodput.wall_seconds) for run in told)))
    rows.append(("starts", *(str(run.goodput.attempts) for run in told)))
    rows.append(("lost steps", *(str(run.goodput.lost_steps) for run in told)))
    header = ("cause", *(run.label for run in told))
    return Table("where the hours went", (("", 1), ("", len(told))), header, tuple(rows))


def hours_text(runs: Sequence[RunRecord]) -> str:
    """The table and what share of the time was training, for a terminal; empty if there is nothing to tell."""
    table = hours_table(runs)
    return f"{as_text(table)}\n{shares_told(runs)}" if table else ""


def shares_told(runs: Sequence[RunRecord]) -> str:
    """`Goodput, training over wall time: base 93.1 %, child 88.0 %.`"""
    told = ", ".join(f"{run.label} {100 * run.goodput.share:.1f} %" for run in runs if run.goodput)
    return f"Goodput, training over wall time: {told}."


def _cell(account: Goodput, cause: str) -> str:
    seconds = account.seconds[cause]
    return f"{as_duration(seconds)} {100 * seconds / account.wall_seconds if account.wall_seconds else 0:5.1f} %"
