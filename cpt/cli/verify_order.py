"""Prove that two runs trained on the same tokens in the same order, however many ranks each had."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.config import Fault
from cpt.observe.records import read_records

EXAMPLE = "cpt verify-order runs/on-one-gpu runs/on-eight-gpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt verify-order`."""
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="two run folders")


def run(arguments: argparse.Namespace) -> int:
    """Compare the hash chains wherever both runs had seen equally many windows; 1 if they differ."""
    first, second = ({r["windows"]: r for r in _order(folder)} for folder in arguments.runs)
    common = sorted(first.keys() & second.keys())
    if not common:
        raise Fault("the runs have no number of windows in common, so there is nothing to compare")
    for windows in common:
        if first[windows]["chain"] != second[windows]["chain"]:
            steps = f"step {first[windows]['step']} and step {second[windows]['step']}"
            print(f"DIFFERENT: the order differs somewhere in the windows up to {windows:,} ({steps})")
            return 1
    print(f"SAME: {common[-1]:,} windows, compared at {len(common):,} places; chain {first[common[-1]]['chain']}")
    return 0


def _order(folder: Path) -> list[dict]:
    path = folder / "order.jsonl"
    if not path.is_file():
        raise Fault(f"{folder} is no run folder: it has no order.jsonl")
    try:
        return list(read_records(path))
    except ValueError as error:
        raise Fault(f"{path} is damaged: {error}") from None
