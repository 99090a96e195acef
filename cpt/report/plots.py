"""Pictures of runs as SVG for the page: training loss, learning rate, held-out loss, score matrix, hours.

A run has one colour in all pictures. Nothing here opens a window or asks for a display. Lines and letters that are not
of a run take the colour of the text around the picture, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cpt.evaluation import ScoreRow
from cpt.observe.speed import as_duration
from cpt.report.goodput import CAUSES
from cpt.report.runs import RunRecord
from cpt.report.tables import all_sources, shortened, tokens_cell

# Told apart by eyes that mix up red and green as well, and neither too light for paper nor too dark for a dark page.
RUN_COLOURS = ("#2f7fc1", "#e0702a", "#2a9d6f", "#a65fc4", "#c9971c", "#d6508a", "#1fa3b8", "#8a8f98")
INK = "#010203"  # stands for the colour of the text around; replaced when the picture is put into the page
HEAT = LinearSegmentedColormap.from_list("heat", ["#fdf6e3", "#f8c471", "#dc7633", "#943126"])  # light is low
LEAST_HEAT_NATS = 0.1  # a source that moved less than this over all runs does not show the whole scale
WIDTH_INCHES = 10.0
MOST_POINTS = 600
MOST_HEAT_ROWS = 24
BRANCH_LINE = {"alpha": 0.7, "linewidth": 1.0, "linestyle": (0, (2, 2))}
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: small, sharp, can be searched
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Curve:
    """Points of one run: tokens since the eldest ancestor in the report, and a value."""

    run: RunRecord
    tokens: np.ndarray
    values: np.ndarray


def training_loss(runs: Sequence[RunRecord]) -> str:
    """Loss of each step over tokens: of the whole batch, and of each source where there are several."""
    sources = list(dict.fromkeys(source for run in runs for step in run.steps for source in step.loss_by_source))
    panels = [("all sources", [curve(run, [(step.tokens, step.loss) for step in run.steps]) for run in runs])]
    for source in sources if len(sources) > 1 else []:
        points = [[(step.tokens, step.loss_by_source.get(source)) for step in run.steps] for run in runs]
        panels.append((source, [curve(run, of_run) for run, of_run in zip(runs, points, strict=True)]))
    return lines(runs, panels, "training loss, nats a token", draw_noisy, "training-loss")


def learning_rate(runs: Sequence[RunRecord]) -> str:
    """Learning rate of each step over tokens."""
    curves = [curve(run, [(step.tokens, step.learning_rate) for step in run.steps]) for run in runs]
    return lines(runs, [("", curves)], "learning rate", draw_plain, "learning-rate")


def held_out_loss(runs: Sequence[RunRecord]) -> str:
    """Loss on held-out text over tokens, a panel a source; the first point of a run is before its first step."""
    panels = []
    for source in all_sources(runs):
        points = [
            [(row.tokens, row.scores[source].loss if source in row.scores else None) for row in run.scores.rows]
            for run in runs
        ]
        panels.append((source, [curve(run, of_run) for run, of_run in zip(runs, points, strict=True)]))
    return lines(runs, panels, "held-out loss, nats a token", draw_dotted, "held-out-loss")


def hours(runs: Sequence[RunRecord]) -> str:
    """A bar a run: its wall time by cause, from left to right in the order of `CAUSES`."""
    told = [run for run in runs if run.goodput]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.4 * len(told)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(told))
        for cause, ink in zip(CAUSES, RUN_COLOURS, strict=True):
            # A clock that was set back must not draw a bar from right to left.
            width = np.array([max(0.0, run.goodput.seconds[cause]) for run in told])
            axes.barh(range(len(told)), width, left=left, color=ink, label=f" {cause}")
            left += width
        axes.set_yticks(range(len(told)), [shortened(run.label) for run in told])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: as_duration(seconds)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(False, axis="y")
        figure.legend(loc="outside upper left", ncols=len(CAUSES))
        return svg(figure, "hours", "wall time of the runs by cause")


def score_heat_map(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """The score matrix of one run with its numbers; a cell is the darker, the higher above the source's lowest loss.

    The scale of a source is the same for all `runs`, so that their maps can be laid side by side. Where children are
    among them it is theirs: a parent's losses before it had learned anything would leave the children one shade.
    """
    sources, rows = run.scores.sources, thinned_rows(run)
    shades = np.array([[shade(row, source, runs) for source in sources] for row in rows])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.85 * max(len(sources), 2), 0.8 + 0.29 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(np.ma.masked_invalid(shades), cmap=HEAT, vmin=0, vmax=1, edgecolors="face")
        for place, row in enumerate(rows):
            for column, source in enumerate(sources):
                if source in row.scores:
                    ink = "#ffffff" if shades[place, column] > 0.6 else "#1a1a1a"
                    number = f"{row.scores[source].loss:.3f}"
                    axes.text(column + 0.5, place + 0.5, number, ha="center", va="center", color=ink)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [row_name(row) for row in rows])
        slant = {"rotation": 30, "ha": "left"} if max(map(len, sources)) > 10 else {}
        axes.set_xticks(np.arange(len(sources)) + 0.5, [shortened(source) for source in sources], **slant)
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, f"scores-{list(runs).index(run)}", f"score matrix of {run.label}")


# ---- lines over tokens


def lines(
    runs: Sequence[RunRecord],
    panels: Sequence[tuple[str, Sequence[Curve]]],
    what: str,
    draw: Callable[[Axes, Curve, str], None],
    name: str,
) -> str:
    """Panels of curves with one legend above them all, two side by side; "" where there is nothing to draw."""
    if not any(len(one.values) for _, curves in panels for one in curves):
        return ""
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    branches = sorted({run.tokens_before for run in runs if run.parent_label})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 2.6 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).flatten()
        for axes, (title, curves) in zip(grid, panels, strict=False):
            for one in curves:
                draw(axes, one, colour(one.run, runs))
            for tokens in branches:
                axes.axvline(tokens, color=INK, **BRANCH_LINE)
            axes.set_title(shortened(title))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: tick(tokens)))
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            look_at_children(axes, curves)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[::num_columns]:
            axes.set_ylabel(what)
        for axes in grid[max(0, len(panels) - num_columns) : len(panels)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("tokens, all runs of the lineage together" if branches else "tokens")
        handles = [Line2D([], [], color=colour(run, runs), linewidth=2) for run in runs]
        labels = [" " + shortened(run.label) for run in runs]  # a name that begins with _ would be left out
        if branches:
            handles.append(Line2D([], [], color=INK, **BRANCH_LINE))
            labels.append(" a child begins")
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        return svg(figure, name, f"{what} over tokens")


def curve(run: RunRecord, points: Sequence[tuple[int, float | None]]) -> Curve:
    """The finite points of a run as a curve over the tokens of its lineage."""
    finite = [(tokens, value) for tokens, value in points if value is not None and math.isfinite(value)]
    tokens, values = np.array(finite, dtype=float).reshape(-1, 2).T
    return Curve(run, tokens + run.tokens_before, values)


def draw_plain(axes: Axes, one: Curve, ink: str) -> None:
    """Draw a curve as a line."""
    tokens, values = thinned(one)
    axes.plot(tokens, values, color=ink, linewidth=1.6)


def draw_dotted(axes: Axes, one: Curve, ink: str) -> None:
    """Draw a curve with a dot at each evaluation."""
    tokens, values = thinned(one)
    axes.plot(tokens, values, color=ink, linewidth=1.6, marker="o" if len(tokens) <= 40 else None, markersize=3.5)


def draw_noisy(axes: Axes, one: Curve, ink: str) -> None:
    """Each step thin and pale, and over it the mean of its neighbourhood, a twenty-fifth of the run."""
    tokens, values = thinned(one)
    half = len(values) // 50
    axes.plot(tokens, values, color=ink, linewidth=0.7, alpha=0.35 if half else 1.0)
    if half:
        sums = np.concatenate([[0.0], np.cumsum(values)])
        first = np.maximum(np.arange(len(values)) - half, 0)
        after = np.minimum(np.arange(len(values)) + half + 1, len(values))
        axes.plot(tokens, (sums[after] - sums[first]) / (after - first), color=ink, linewidth=1.6)


def thinned(one: Curve) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of equal groups of neighbours."""
    size = math.ceil(len(one.values) / MOST_POINTS)
    if size <= 1:
        return one.tokens, one.values
    starts = np.arange(0, len(one.values), size)
    counts = np.diff(np.append(starts, len(one.values)))
    return np.add.reduceat(one.tokens, starts) / counts, np.add.reduceat(one.values, starts) / counts


def look_at_children(axes: Axes, curves: Sequence[Curve]) -> None:
    """Cuts off the top of a parent's first steps, whose losses would press the children's differences flat."""
    children = [one.values for one in curves if one.run.parent_label and len(one.values)]
    everything = [one.values for one in curves if len(one.values)]
    if not children:
        return
    top, bottom = max(map(np.max, children)), min(map(np.min, everything))
    margin = 0.12 * (top - bottom) or 0.05 * abs(top) or 1.0
    if max(map(np.max, everything)) > top + 3 * margin:
        axes.set_ylim(bottom - 0.5 * margin, top + 3 * margin)


def colour(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """The colour that a run has in every picture."""
    return RUN_COLOURS[[other.label for other in runs].index(run.label) % len(RUN_COLOURS)]


def tick(tokens: float) -> str:
    """A number of tokens as an axis shows it."""
    number, _, unit = tokens_cell(tokens).partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + (f" {unit}" if unit else "")


# ---- heat map


def thinned_rows(run: RunRecord) -> list[ScoreRow]:
    """Rows with scores; where there are too many, the milestones and as many between them as there is room for."""
    rows = [row for row in run.scores.rows if row.scores]
    milestones = {row.step for row in run.scores.milestones()}
    others = [row.step for row in rows if row.step not in milestones]
    room = max(MOST_HEAT_ROWS - len(milestones), 0)
    if len(others) > room:
        others = [others[place * len(others) // room] for place in range(room)]
    return [row for row in rows if row.step in milestones or row.step in set(others)]


def shade(row: ScoreRow, source: str, runs: Sequence[RunRecord]) -> float:
    """0 at the lowest loss that any run had on the source, 1 at the highest (of the children, if there are any).

    Not a number where there is no loss.
    """
    if source not in row.scores or not math.isfinite(row.scores[source].loss):
        return math.nan
    lowest = min(finite_losses(runs, source))
    highest = max(finite_losses([run for run in runs if run.parent_label], source) or finite_losses(runs, source))
    return min((row.scores[source].loss - lowest) / max(highest - lowest, LEAST_HEAT_NATS), 1.0)


def finite_losses(runs: Sequence[RunRecord], source: str) -> list[float]:
    """All finite losses of a source in these runs."""
    return [loss for run in runs for loss in run.scores.column(source) if loss is not None and math.isfinite(loss)]


def row_name(row: ScoreRow) -> str:
    """What a row of the score matrix is called."""
    if row.step == 0:
        return "before step 1"
    return f"{shortened(row.stage)}, end, step {row.step}" if row.is_stage_end else f"step {row.step}"


# ---- SVG


def svg(figure: Figure, name: str, description: str) -> str:
    """The picture as an <svg> element that can stand in a page among others: ids of its own, the page's text colour."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # else the ids differ each time
        FigureCanvasSVG(figure).print_svg(
            written, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped(description)}" ', 1)


def escaped(words: str) -> str:
    """Words that are safe inside SVG."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
