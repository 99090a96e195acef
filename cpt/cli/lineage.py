"""Show the tree that a run stands in, ancestors, children and branches, and what its lineage has consumed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from cpt.checkpoint import RunFolder, find_checkpoint
from cpt.config import Fault, read_mapping
from cpt.lineage.ledger import Ledger
from cpt.lineage.tree import Kin, Member, families

EXAMPLE = "cpt lineage runs/quickstart/replay"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt lineage`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")


def run(arguments: argparse.Namespace) -> int:
    """Print the trees, then the ledger of each run."""
    asked = list({path.resolve(): path for path in arguments.runs}.values())
    marked = {path.resolve() for path in asked}
    for kin in families(asked):
        print("\n".join(_drawn(kin, marked)))
    for path in asked:
        print("\n".join(["", f"consumed by the lineage of {path}", *_ledger_lines(path / "ledger.json")]))
    return 0


def _drawn(kin: Kin, asked: set[Path], first: str = "", rest: str = "") -> Iterator[str]:
    """A run and all below it: its name and where it began, then how far it has come; `first`, `rest`: of its lines."""
    member, children = kin
    mark = "  <-" if member.run.resolve() in asked else ""
    yield f"{first}{_shortened(member.run)}  ({_beginning(member)}){mark}"
    yield f"{rest}{'│' if children else ' '}    {_standing(member.run)}"
    for index, child in enumerate(children):
        is_last = index + 1 == len(children)
        yield from _drawn(child, asked, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))


def _shortened(path: Path) -> Path:
    """As one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _beginning(member: Member) -> str:
    above = member.parent
    if above is None:
        return f"began from {member.weights or 'nothing'}"
    gone = "" if (above.run / "lineage.json").is_file() else ", which is not there"
    what = "a branch, left" if _is_branch(member.run) else "began"
    return f"{what} at step {above.step:,} of {above.run.name}{gone}"


def _is_branch(path: Path) -> bool:
    """Whether a run goes down all the way, as its settings say, if they can be read."""
    try:
        (stage, *_) = read_mapping([str(path / "run.yaml")])["stages"]
        return stage["schedule"]["name"] == "branch"
    except (Fault, KeyError, TypeError, ValueError):
        return False


def _standing(path: Path) -> str:
    """Steps, tokens, last learning rate and what the lineage has consumed, at the newest checkpoint that is whole."""
    checkpoints = RunFolder(path).checkpoints
    try:
        found = find_checkpoint(checkpoints, check=False) if checkpoints.is_dir() else None
        if found is None:
            return "nothing saved"
        progress, rate = found.state["progress"], found.state["rate"]
        entries = Ledger.from_json(found.state["ledger"]).entries
    except (Fault, KeyError, TypeError, AttributeError):
        return "its checkpoints cannot be read; cpt checkpoint verify tells why"
    consumed = ", ".join(f"{e.num_consumed * e.sequence_length:,} of {e.source}" for e in entries)
    end = "" if RunFolder(path).is_finished else ", not finished"
    return f"{progress['step']:,} steps, {progress['tokens']:,} tokens, last rate {rate:.2e}{end}; consumed {consumed}"


def _ledger_lines(path: Path) -> list[str]:
    """The table of a ledger. Raises Fault if there is none that can be read."""
    if not path.is_file():
        raise Fault(f"{path}: the run has saved nothing yet, so its ledger is empty")
    try:
        ledger = Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"{path} is damaged ({error!r}); the newest checkpoint holds another copy") from None
    lines = ["source                   windows        tokens  epochs  corpus"]
    for entry in ledger.entries:
        tokens, epochs = entry.num_consumed * entry.sequence_length, entry.num_consumed / entry.num_windows
        lines.append(f"{entry.source:<20} {entry.num_consumed:>11,} {tokens:>13,}  {epochs:>6.2f}  {entry.corpus}")
    lines += [
        f"replay {float(100 * change.share):.4g}% of stage {change.stage} from window {change.window:,} on: "
        f"{change.source} had lost {change.forgetting:.4f} nats a token"
        for change in ledger.share_changes
    ]
    lines += [
        f"{one.number:,} windows of stage {one.stage} from window {one.window:,} on: nothing is learned from them: "
        f"{one.reason}, at step {one.step:,}"
        for one in ledger.skipped
    ]
    return lines + [
        f"stop_if ended a run after its step {stop.step:,}, in stage {stop.stage}: "
        f"{stop.source} had lost {stop.forgetting:.4f} nats a token, {stop.above:g} was allowed"
        for stop in ledger.stops
    ]
