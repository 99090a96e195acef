"""The measures of each run and its parents, and what its stages did to other sources, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpt.evaluation.measures import measures, passages
from cpt.report.runs import RunRecord
from cpt.report.tables import Table, as_text, difference_cell, loss_cell, tokens_cell


def measures_table(runs: Sequence[RunRecord], baseline: Mapping[str, float] | None = None) -> Table | None:
    """The measures of each run and the runs it descends from; None if no run has any."""
    found = [(run.label, measures(run.history, baseline)) for run in runs if run.history]
    found = [(label, numbers) for label, numbers in found if any(value is not None for value in vars(numbers).values())]
    if not found:
        return None
    rows = tuple(
        (
            label,
            *(loss_cell(value) for value in (numbers.learned, numbers.retained)),
            *(
                difference_cell(value)
                for value in (numbers.forgetting, numbers.backward_transfer, numbers.forward_transfer)
            ),
        )
        for label, numbers in found
    )
    header = ("run", "learned", "retained", "forgetting", "BWT", "FWT")
    return Table("measures over each run and its parents, nats a token", (("", 1), ("", 5)), header, rows)


def passages_table(runs: Sequence[RunRecord]) -> Table | None:
    """What each stage did to the sources that it does not learn, once for runs that share a parent; None if nothing."""
    told = dict.fromkeys(passage for run in runs if run.history for passage in passages(run.history))
    if not told:
        return None
    rows = tuple(
        (
            one.run,
            one.stage,
            one.source,
            loss_cell(one.before),
            loss_cell(one.after),
            difference_cell(one.after - one.before),
            f"{one.gap:.3f}",
            "not back" if one.recovery_tokens is None else tokens_cell(one.recovery_tokens),
        )
        for one in told
    )
    header = ("run", "stage", "source", "before", "after", "change", "gap", "tokens to recover")
    return Table("what each stage did to other sources, nats a token", (("", 3), ("", 5)), header, rows)


def measures_text(runs: Sequence[RunRecord], baseline: Mapping[str, float] | None = None) -> str:
    """The measures and what stages did to other sources, for a terminal; empty if there is nothing to tell."""
    tables = (measures_table(runs, baseline), passages_table(runs))
    return "\n\n".join(as_text(table) for table in tables if table)
