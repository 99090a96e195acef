"""A version plan read through without training: its cost beside other ways to the same releases, then its path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cpt.config import build
from cpt.planning.plan import plan_lines
from cpt.progress import Progress
from cpt.versions.cost import Cost
from cpt.versions.reading import Release, Versions


def plan_lines_of_versions(plan: Versions, num_ranks: int) -> Iterator[str]:
    """The plan on `num_ranks`, a line at a time. Raises Fault with everything that cannot work."""
    path = list(plan_lines(plan.main, num_ranks))  # first: what cannot work is told before anything else
    yield from _table(
        [
            ("version", "tokens", "branch leaves at step", "its tokens", "its learning rate"),
            *(_row(plan, number, release) for number, release in enumerate(plan.releases)),
        ]
    )
    yield ""
    yield from cost_lines(plan.cost)
    yield ""
    yield f"main path: {plan.main.output}, to where the last branch leaves it"
    yield from path


def cost_lines(cost: Cost) -> list[str]:
    """A table of the tokens to train on for all releases, and their share of those from scratch and plainly on."""
    ways = {
        "main path and branches": cost.path_and_branches,
        "each version from scratch": cost.from_scratch,
        "plainly on, one after another": cost.plainly_on,
    }
    rows = [
        (name, f"{tokens:,}", f"{tokens / cost.from_scratch:.0%}", f"{tokens / cost.plainly_on:.0%}")
        for name, tokens in ways.items()
    ]
    return _table([(f"cost of {len(cost.versions)} releases", "tokens", "of scratch", "of plainly on"), *rows])


def _row(plan: Versions, number: int, release: Release) -> tuple[str, ...]:
    run, place = release.run, release.place
    stage = plan.main.stages[number]
    before = Progress(stage_tokens=place.stage_tokens - plan.main.tokens_a_step)
    rate = build(stage.schedule, "Schedule", stage.total_tokens, 0.0).rate(before)
    last = build(run.stages[0].schedule, "Schedule", run.total_tokens, rate).rate(
        Progress(stage_tokens=run.total_tokens - run.tokens_a_step)
    )
    rates = f"{rate:.2e} to {last:.2e}"
    return release.name, f"{plan.tokens[number]:,}", f"{place.step:,}", f"{run.total_tokens:,}", rates


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
