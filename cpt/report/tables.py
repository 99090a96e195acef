"""The numbers of one or several runs as tables and sentences, for the terminal and for the page alike.

A table is made once, of plain cells; `as_text` aligns it for a terminal and cpt/report/page.py turns it into HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpt.evaluation import Score, best, forgetting, last, rise
from cpt.report.runs import RunRecord

NOTICEABLE = 0.01  # nats a token; a smaller difference is told as none
FULL = ("before", "best", "after", "forgetting", "bits/byte")
SHORTER = ("before", "after", "forgetting", "bits/byte")  # the best is what forgetting lies above
SHORTEST = ("before", "after", "forgetting")
LONGEST_NAME = 28


@dataclass(frozen=True)
class Table:
    """Cells as text. The columns stand in groups, each with a title (empty: none); the first group is aligned left."""

    title: str
    groups: tuple[tuple[str, int], ...]  # (title, number of columns)
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


# ---- what the tables say


def comparison_tables(runs: Sequence[RunRecord], width: int) -> list[Table]:
    """Every run against every source: its held-out loss before, at its best and after, forgetting, bits per byte.

    One table with the sources side by side where that fits into `width` characters, if need be with fewer columns;
    else a table for each source.
    """
    sources = all_sources(runs)
    if not sources:
        return []
    for columns in (FULL, SHORTER, SHORTEST):
        table = comparison("held-out loss, nats a token", runs, sources, columns)
        if max(len(line) for line in as_text(table).split("\n")) <= width:
            return [table]
    return [comparison(f"held-out loss of {source}, nats a token", runs, [source], FULL) for source in sources]


def comparison(title: str, runs: Sequence[RunRecord], sources: Sequence[str], columns: Sequence[str]) -> Table:
    """A row for each run, a group of columns for each source."""
    rows = []
    for run in runs:
        cells = [run.label]
        for source in sources:
            numbers = source_numbers(run, source)
            cells += [numbers[column] for column in columns]
        rows.append(tuple(cells))
    return Table(
        title=title,
        groups=(("", 1), *((source if len(sources) > 1 else "", len(columns)) for source in sources)),
        header=("run", *(list(columns) * len(sources))),
        rows=tuple(rows),
    )


def source_numbers(run: RunRecord, source: str) -> dict[str, str]:
    """The cells of one run and one source by their column."""
    losses = run.scores.column(source)
    score = run.scores.last_score(source)
    return {
        "before": loss_cell(losses[0]),
        "best": loss_cell(best(losses)),
        "after": loss_cell(last(losses)),
        "forgetting": difference_cell(forgetting(losses)),
        "bits/byte": loss_cell(score.bits_per_byte if score else None),
    }


def matrix_tables(run: RunRecord, width: int) -> list[Table]:
    """The score matrix of a run at its milestones, as many sources side by side as fit; then forgetting and rise."""
    tables = []
    rows = run.scores.milestones()
    sources = list(run.scores.sources)
    while sources:
        num_sources = len(sources)
        while True:
            chosen = sources[:num_sources]
            table = Table(
                title=f"score matrix of {run.label}: held-out loss, nats a token",
                groups=(("", 1), ("", 2), ("", len(chosen))),
                header=("stage", "step", "tokens", *chosen),
                rows=(
                    *(
                        (
                            "before the first step"
                            if row.step == 0
                            else row.stage + (", end" if row.is_stage_end else ""),
                            str(row.step),
                            tokens_cell(row.tokens),
                            *(score_cell(row.scores.get(source)) for source in chosen),
                        )
                        for row in rows
                    ),
                    ("forgetting", "", "", *(difference_cell(forgetting(run.scores.column(name))) for name in chosen)),
                    ("rise", "", "", *(difference_cell(rise(run.scores.column(name))) for name in chosen)),
                ),
            )
            if num_sources == 1 or max(len(line) for line in as_text(table).split("\n")) <= width:
                break
            num_sources -= 1
        tables.append(table)
        sources = sources[num_sources:]
    return tables


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """What each run did: where it came from, how far it went, how fast."""
    rows = []
    for run in runs:
        newest = run.steps[-1] if run.steps else None
        speeds = sorted(step.tokens_per_second for step in run.steps if step.tokens_per_second is not None)
        rows.append(
            (
                run.label,
                f"{run.parent_label or run.parent.folder} at step {run.parent.step}" if run.parent else "none",
                str(newest.step if newest else run.scores.rows[-1].step),
                tokens_cell(run.tokens),
                loss_cell(newest.loss if newest else None),
                tokens_cell(speeds[len(speeds) // 2]) if speeds else "-",
                str(sum(step.skipped for step in run.steps)),
            )
        )
    header = ("run", "parent", "steps", "tokens", "training loss", "tokens/s", "skipped steps")
    return Table("runs", (("", 2), ("", 5)), header, tuple(rows))


def findings(runs: Sequence[RunRecord]) -> list[str]:
    """What was learned and what was lost, a sentence a run, then one for each source that siblings kept unequally."""
    return [finding(run) for run in runs] + comparisons_of_siblings(runs)


def finding(run: RunRecord) -> str:
    """What one run learned, lost and kept, as a sentence."""
    learned, lost, kept = [], [], []
    for source in run.scores.sources:
        losses = run.scores.column(source)
        newest, change, height = last(losses), rise(losses), forgetting(losses)
        if newest is None or not math.isfinite(newest):
            lost.append(f"{source} (loss {loss_cell(newest)})")
            continue
        if change is not None and change < -NOTICEABLE:
            learned.append(f"{source} ({loss_cell(losses[0])} to {loss_cell(newest)})")
        if height > NOTICEABLE:
            lost.append(
                f"{height:.3f} nats of {source} ({loss_cell(best(losses))} at its best, {loss_cell(newest)} now)"
            )
        elif change is not None and change >= -NOTICEABLE:
            kept.append(f"{source} ({loss_cell(newest)})")
    told = [
        f"{word} {listing(things)}" for word, things in (("learned", learned), ("lost", lost), ("kept", kept)) if things
    ]
    if told:
        return f"{run.label} {'; '.join(told)}."
    return f"{run.label} has not been evaluated before and after training yet."


def comparisons_of_siblings(runs: Sequence[RunRecord]) -> list[str]:
    """For runs that left the same parent at the same step: who forgot the least of a source, and who the most."""
    families: dict[tuple[str, int], list[RunRecord]] = {}
    for run in runs:
        if run.parent:
            families.setdefault((run.parent_label or run.parent.folder, run.parent.step), []).append(run)
    told = []
    for siblings in families.values():
        for source in all_sources(siblings):
            heights = {run.label: forgetting(run.scores.column(source)) for run in siblings}
            heights = {
                label: height for label, height in heights.items() if height is not None and math.isfinite(height)
            }
            if len(heights) < 2:
                continue
            least, most = min(heights, key=heights.__getitem__), max(heights, key=heights.__getitem__)
            if heights[most] - heights[least] > NOTICEABLE:
                share = 100 * (1 - heights[least] / heights[most])
                both = f"{least} forgot {heights[least]:.3f} and {most} {heights[most]:.3f}"
                told.append(f"Of {source}, {both}: {share:.0f} % less.")
    return told


def all_sources(runs: Sequence[RunRecord]) -> list[str]:
    """The sources that any of the runs was scored on, in order of appearance."""
    return list(dict.fromkeys(source for run in runs for source in run.scores.sources))


def listing(things: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


# ---- cells


def loss_cell(loss: float | None) -> str:
    """A loss with three decimals, a dash if there is none."""
    return "-" if loss is None else f"{loss:.3f}"


def score_cell(score: Score | None) -> str:
    """A loss with the half width of its 95 % interval, if that is known: 3.412 ±0.021."""
    if score is None or score.interval is None:
        return loss_cell(score.loss if score else None)
    return f"{loss_cell(score.loss)} ±{score.interval:.3f}"


def difference_cell(difference: float | None) -> str:
    """A difference with its sign and three decimals, a dash if there is none."""
    return "-" if difference is None else f"{difference:+.3f}"


def tokens_cell(tokens: float) -> str:
    """Three figures and a unit: 812, 4.10 k, 999 k, 1.23 M, 15.0 T."""
    for unit in ("", " k", " M", " B"):
        if abs(tokens) < 999.5:
            break
        tokens /= 1000
    else:
        unit = " T"
    if not unit:
        return f"{tokens:.0f}"
    return f"{tokens:.{2 if tokens < 9.995 else 1 if tokens < 99.95 else 0}f}{unit}"


# ---- text


def comparison_text(runs: Sequence[RunRecord], width: int = 100) -> str:
    """The runs against one another, for a terminal of `width` characters."""
    tables = comparison_tables(runs, width)
    return "\n\n".join(as_text(table) for table in tables) if tables else "no run has been evaluated yet"


def matrix_text(run: RunRecord, width: int = 100) -> str:
    """The score matrix of one run, for a terminal of `width` characters."""
    tables = matrix_tables(run, width)
    return "\n\n".join(as_text(table) for table in tables) if tables else f"{run.label} has not been evaluated yet"


def runs_text(runs: Sequence[RunRecord]) -> str:
    """What each run did, for a terminal."""
    return as_text(runs_table(runs))


def as_text(table: Table) -> str:
    """A table in characters: title, titles of the groups if there are any, header, rows; groups apart by a bar."""
    lines = [table.header, *table.rows]
    lines = [tuple(shortened(cell) for cell in line) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    spans, first = [], 0
    for title, num_columns in table.groups:
        columns = list(range(first, first + num_columns))
        missing = len(shortened(title)) - (sum(widths[column] for column in columns) + 2 * (num_columns - 1))
        if missing > 0:  # a long title makes room in its last column
            widths[columns[-1]] += missing
        spans.append(columns)
        first += num_columns
    text = [table.title]
    if any(title for title, _ in table.groups):
        text.append(
            " | ".join(
                shortened(title).ljust(sum(widths[column] for column in columns) + 2 * (len(columns) - 1))
                for (title, _), columns in zip(table.groups, spans, strict=True)
            )
        )
    for line in lines:
        groups = []
        for place, columns in enumerate(spans):
            cells = [line[c].ljust(widths[c]) if place == 0 else line[c].rjust(widths[c]) for c in columns]
            groups.append("  ".join(cells))
        text.append(" | ".join(groups))
    return "\n".join(line.rstrip() for line in text)


def shortened(name: str) -> str:
    """A name that fits a column: a long one loses its middle."""
    if len(name) <= LONGEST_NAME:
        return name
    kept = (LONGEST_NAME - 1) // 2
    return name[:kept] + "…" + name[-(LONGEST_NAME - 1 - kept) :]
