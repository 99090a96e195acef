"""Show what a run descends from, and what its lineage has consumed of each source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cpt.config import Fault
from cpt.lineage.ledger import Ledger
from cpt.lineage.tree import ancestry

EXAMPLE = "cpt lineage runs/quickstart/replay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt lineage`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")


def run(arguments: argparse.Namespace) -> int:
    """Print the line of ancestors and the ledger."""
    for depth, member in enumerate(ancestry(arguments.run)):
        began = f"began from {member.weights or 'nothing'}"
        if member.parent:
            began = f"began at step {member.parent.step} of {member.parent.run.name}"
        print(f"{'   ' * depth}{'└─ ' if depth else ''}{member.run}  ({began})")
    path = arguments.run / "ledger.json"
    if not path.is_file():
        raise Fault(f"{path}: the run has saved nothing yet, so its ledger is empty")
    try:
        ledger = Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"{path} is damaged ({error!r}); the newest checkpoint holds another copy") from None
    print("\nconsumed                 windows        tokens  epochs  corpus")
    for entry in ledger.entries:
        tokens, epochs = entry.num_consumed * entry.sequence_length, entry.num_consumed / entry.num_windows
        print(f"{entry.source:<20} {entry.num_consumed:>11,} {tokens:>13,}  {epochs:>6.2f}  {entry.corpus}")
    return 0
