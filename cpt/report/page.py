"""One HTML page about several runs: no scripts, no network, no second file; it can be mailed and kept.

Top to bottom: what was learned and lost in words, the tables, the pictures, the score matrices, the hours, the runs,
their lineage and their settings. All text from files is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cpt.config import Fault
from cpt.report import plots
from cpt.report.goodput import CAUSES
from cpt.report.hours import hours_table, shares_told
from cpt.report.measures import measures_table, passages_table
from cpt.report.runs import RunRecord
from cpt.report.tables import (
    Table,
    comparison_tables,
    findings,
    runs_table,
    tokens_cell,
)

TABLE_WIDTH = 120  # characters that fit across the page

TERMS = (
    "Losses are on held-out text, in nats a token: lower is better. Forgetting is how far a loss lies above its lowest "
    "so far in the same run, the one before the first step included: 0 where nothing was lost."
)
MEASURES = (
    "Learned: mean loss of each source right after its own stage. Retained: the same, now. Forgetting: mean height of "
    "old sources above their best so far. BWT: positive where later stages helped old sources, negative where they "
    "were forgotten. FWT: positive where a source was known better just before its own stage than before the first. "
    "Gap: the part of a rise that went away again within the stage."
)
STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --pale: #626a75; --line: #d6dae0; --paper: #ffffff;
        --panel: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --pale: #9aa3af; --line: #3a4049; --paper: #16191d; --panel: #1f2329; }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
h3 { font-size: 1rem; margin-bottom: 0.3rem; }
.lead li { margin: 0.3rem 0; }
.pale, figcaption { color: var(--pale); font-size: 0.88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
caption { text-align: left; color: var(--pale); padding-bottom: 0.3rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.left { text-align: left; }
.first { border-left: 1px solid var(--line); }
figure { margin: 1.2rem 0; }
svg { max-width: 100%; height: auto; }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.maps figure { margin: 0.5rem 0; }
details { background: var(--panel); border-radius: 6px; padding: 0.5rem 0.9rem; margin: 0.6rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 0.85rem; }
"""


def write_report(runs: Sequence[RunRecord], output: Path) -> None:
    """Writes the page, or leaves what was there: it is written aside and then renamed.

    Raises Fault if the file cannot be written or its name is not that of a page.
    """
    check_output(output)
    aside = output.with_name(f".{output.name}.{os.getpid()}.part")
    text = page(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, output)
    except OSError as error:
        raise Fault(
            f"cannot write the report {output}: {error.strerror or error}; name a file in a folder you may write to"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """Raises Fault if the name is not one of a page; before any work, and so that no other file is overwritten."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise Fault(f"--output {output} is not the name of a page; give it the ending .html")
    if output.is_dir():
        raise Fault(f"--output {output} is a folder; name a file in it, such as {output / 'report.html'}")


def page(runs: Sequence[RunRecord]) -> str:
    """The whole page as text; the same runs give the same text."""
    title = "Report on " + ", ".join(run.label for run in runs)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="pale">{TERMS}</p>',
        '<ul class="lead">' + "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(runs)) + "</ul>",
        notes(runs),
        section("What was learned, what was lost", "".join(map(html_table, comparison_tables(runs, TABLE_WIDTH)))),
        section("Measures", measures_of(runs)),
        section("Over the course of training", pictures(runs)),
        section("Score matrices", heat_maps(runs)),
        section("Where the hours went", hours(runs)),
        section("Runs", html_table(runs_table(runs))),
        section("Lineage", lineage(runs)),
        section("Settings", "".join(settings(run) for run in runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The page asks for nothing, and a browser holds it to that.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A headed part of the page; nothing if it has no content."""
    return f"<h2>{title}</h2>\n{content}" if content else ""


def measures_of(runs: Sequence[RunRecord]) -> str:
    """The measures of the lineages with what they mean; nothing if there are none."""
    tables = [table for table in (measures_table(runs), passages_table(runs)) if table]
    return f'<p class="pale">{MEASURES}</p>' + "".join(map(html_table, tables)) if tables else ""


def notes(runs: Sequence[RunRecord]) -> str:
    """What was odd about the files of the runs, as a list."""
    told = [note for run in runs for note in run.notes]
    return f'<p class="pale">Note: {escape("; ".join(told))}.</p>' if told else ""


def html_table(table: Table) -> str:
    """A table of cells as HTML; columns of the first group to the left, a line between groups."""
    num_left = table.groups[0][1]
    firsts, place = set(), 0
    for _, num_columns in table.groups:
        firsts.add(place)
        place += num_columns
    classes = [
        " ".join(filter(None, ["left" if column < num_left else "", "first" if column in firsts and column else ""]))
        for column in range(place)
    ]
    head = ""
    if any(title for title, _ in table.groups):
        titles = "".join(
            f'<th class="left{" first" if number else ""}" colspan="{num_columns}">{escape(title)}</th>'
            for number, (title, num_columns) in enumerate(table.groups)
        )
        head = f"<tr>{titles}</tr>"
    head += "<tr>" + "".join(
        f'<th class="{kind}" scope="col">{escape(cell)}</th>' for kind, cell in zip(classes, table.header, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )


def pictures(runs: Sequence[RunRecord]) -> str:
    """The curves over the course of training."""
    told = [
        (plots.held_out_loss(runs), "Loss on held-out text, before the first step and at each evaluation since."),
        (plots.training_loss(runs), "Loss of the training steps; the bold line is a running mean."),
        (plots.learning_rate(runs), "Learning rate."),
    ]
    return "\n".join(figure(picture, caption) for picture, caption in told if picture)


def hours(runs: Sequence[RunRecord]) -> str:
    """The wall time of the runs by cause, with what the causes mean; nothing if no run has noted its starts."""
    table = hours_table(runs)
    if table is None:
        return ""
    told = f"{shares_told(runs)} " + "; ".join(f"{cause}: {meaning}" for cause, meaning in CAUSES.items()) + "."
    return f'<p class="pale">{escape(told)}</p>' + figure(plots.hours(runs), "Wall time by cause.") + html_table(table)


def heat_maps(runs: Sequence[RunRecord]) -> str:
    """The score matrix of each run that was evaluated."""
    evaluated = [run for run in runs if run.scores.sources]
    if not evaluated:
        return ""
    maps = "\n".join(figure(plots.score_heat_map(run, runs), f"{run.label}: held-out loss") for run in evaluated)
    told = "The darker a cell, the higher the loss lies above the lowest that any of these runs had on that source."
    return f'<p class="pale">{told}</p>\n<div class="maps">{maps}</div>'


def figure(picture: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def lineage(runs: Sequence[RunRecord]) -> str:
    """The runs as a tree: each under its parent, if that is in the report."""
    labels = {run.label for run in runs}
    roots = [run for run in runs if run.parent_label not in labels]
    return "<ul>" + "".join(branch(run, runs) for run in roots) + "</ul>" if roots else ""


def branch(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Where a run began, in words."""
    origin = "starts afresh"
    if run.parent:
        origin = f"left {run.parent_label or run.parent.folder} at step {run.parent.step}"
        origin += f", after {tokens_cell(run.parent.tokens)} tokens"
    children = "".join(branch(child, runs) for child in runs if child.parent_label == run.label)
    told = f"<b>{escape(run.label)}</b>: {escape(origin)}; trained on {tokens_cell(run.tokens)} tokens "
    return (
        f'<li>{told}<span class="pale">{escape(str(run.folder))}</span>'
        + (f"<ul>{children}</ul>" if children else "")
        + "</li>"
    )


def settings(run: RunRecord) -> str:
    """`run.yaml` of a run, folded away."""
    text = run.settings or "run.yaml is not there"
    return f"<details><summary>{escape(run.label)}</summary><pre>{escape(text)}</pre></details>\n"
