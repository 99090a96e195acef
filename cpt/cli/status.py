"""Tell where a run is: queued, running (how far, how fast, how long still), finished, stopped, failed and why.

Reads the run's folder and asks SLURM, where there is one. Ends with 0 whatever it tells, with 2 if there is no run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from cpt.observe.speed import as_duration
from cpt_launcher.status import Status, status_of

EXAMPLE = "cpt status runs/mine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and in which form."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print where the run is. Raises Fault if there is none."""
    status = status_of(arguments.run)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(status), "run": str(status.run)}, indent=1))
    else:
        print("\n".join(lines_of(status)))
    return 0


def lines_of(status: Status) -> list[str]:
    """The lines for a person: what matters most first, and nothing that is not known."""
    told = f"{status.run}: {status.state}" + (f": {status.reason}" if status.reason else "")
    return [told, *(f"  {line}" for line in [*_facts(status), *status.last_words] if line)]


def _facts(status: Status) -> list[str]:
    lines = []
    if status.step is not None:
        total = f" of {status.total_tokens:,}" if status.total_tokens else ""
        line = f"step {status.step:,}, {status.tokens or 0:,}{total} tokens"
        if status.total_tokens:
            line += f" ({(status.tokens or 0) / status.total_tokens:.1%})"
        if status.loss is not None:
            line += f", loss {status.loss:.4f}"
        if status.seconds_since_step is not None and status.state != "finished":
            line += f", {as_duration(status.seconds_since_step)} ago"
        lines.append(line)
    if status.tokens_per_second:
        left = f", {as_duration(status.seconds_left)} left" if status.seconds_left is not None else ""
        lines.append(f"{status.tokens_per_second:,.0f} tokens/s{left}")
    if status.ranks:
        lines.append(f"{status.ranks} rank(s) on {', '.join(status.nodes) or 'nodes that are not told'}")
    if status.job:
        lines.append(f"job {status.job}" + (f", {status.job_state} to SLURM" if status.job_state else ""))
    if status.checkpoint is not None and status.seconds_since_checkpoint is not None:
        lines.append(
            f"newest checkpoint: step {status.checkpoint:,}, {as_duration(status.seconds_since_checkpoint)} ago"
        )
    elif status.state != "queued":
        lines.append("no checkpoint yet")
    if status.starts > 1 or status.failures:
        lines.append(f"started {status.starts} time(s), of which {status.failures} failed")
    lines += status.notes
    if status.advice:
        lines.append(f"next: {status.advice}")
    return lines
