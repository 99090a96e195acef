"""Look into the checkpoints of a run, verify that they are whole, remove those that its policy does not keep.

`cpt checkpoint inspect` reads no weights; `verify` reads every byte, and ends with 1 if any is not as it was written.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cpt.checkpoint import Checkpoint, RunFolder, find_checkpoint, keep
from cpt.checkpoint.damage import damage_of
from cpt.checkpoint.settings import Settings
from cpt.checkpoint.write import checkpoint_folders
from cpt.config import Fault, read_mapping, read_settings
from cpt.lineage.tree import read_lineage
from cpt.parallel.mesh import Mesh
from cpt.run.reading import stages_trained

EXAMPLE = "cpt checkpoint verify runs/quickstart/replay"

_NAMED = re.compile(r"step-(\d+)")  # also one that was put by, or renamed by a person
_KEPT = {keep.TEMPORARY: "temporary", keep.FOR_EVER: "for ever", keep.UNREAD: "unread", None: "among last"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="COMMAND")
    inspect = _command(commands, "inspect", "tell what checkpoints hold and why they are kept", _inspect)
    inspect.add_argument("path", type=Path, metavar="RUN|CHECKPOINT", help="a run folder, or .../checkpoints/step-...")
    inspect.add_argument("--json", action="store_true", help="as JSON on standard output")
    verify = _command(commands, "verify", "read every byte and name what is damaged", _verify)
    verify.add_argument("path", type=Path, metavar="RUN|CHECKPOINT", help="a run folder, or .../checkpoints/step-...")
    prune = _command(commands, "prune", "remove the checkpoints that the run's policy does not keep", _prune)
    prune.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    prune.add_argument("--keep", type=int, metavar="N", help="the newest N stay (default: checkpoint.keep_last)")
    prune.add_argument("--dry-run", action="store_true", help="tell what would go, and remove nothing")


def run(arguments: argparse.Namespace) -> int:
    """The chosen subcommand's exit status."""
    return arguments.checkpoint_run(arguments)


def _command(
    commands: argparse._SubParsersAction, name: str, told: str, function: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=told, description=f"{told.capitalize()}.", epilog=f"example: cpt checkpoint {name} runs/mine"
    )
    parser.set_defaults(checkpoint_run=function)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    run, folders = _found(arguments.path)
    parent = read_lineage(run).parent if (run / "lineage.json").is_file() else None
    told = {
        "run": str(run),
        "parent": {"run": str(parent.run), "step": parent.step} if parent else None,
        "checkpoints": [_summary(folder, _stage_names(run)) for folder in folders],
    }
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    print(f"{run}  ({f'a child of {parent.run} at step {parent.step}' if parent else 'no parent'})")
    print("    step          tokens  stage        kept       tensors     parameters      GB  kinds")
    for one in told["checkpoints"]:
        if "damage" in one:
            print(f"{one['step']:>8,}  damaged: {one['damage']}")
            continue
        print(
            f"{one['step']:>8,}  {one['tokens']:>14,}  {one['stage'] or '':<11}  {one['kept']:<9}  "
            f"{one['num_tensors']:>8,}  {one['num_parameters']:>13,}  {one['num_bytes'] / 1e9:>6.2f}  "
            f"{' '.join(one['kinds'])}"
        )
    return 0


def _summary(folder: Path, stages: list[str]) -> dict[str, Any]:
    """What a checkpoint holds, or what is wrong with it as far as a look at it shows."""
    step = int(_NAMED.match(folder.name)[1])
    try:
        checkpoint = Checkpoint(folder, check=False)
    except Fault as fault:
        return {"step": step, "folder": str(folder), "damage": str(fault)}
    progress, shapes = checkpoint.state["progress"], checkpoint.shapes
    last = stages_trained(progress) - 1
    return {
        "step": step,
        "folder": str(folder),
        "tokens": progress["tokens"],
        "stage": stages[last] if 0 <= last < len(stages) else None,
        "kept": _KEPT[keep.mark_of(folder)],
        "num_tensors": len(shapes),
        "num_parameters": sum(map(math.prod, shapes.values())),
        "num_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "kinds": checkpoint.kinds,
    }


def _verify(arguments: argparse.Namespace) -> int:
    _, folders = _found(arguments.path)
    num_damaged = 0
    num_bytes = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        for folder in folders:
            damage = damage_of(folder, bar.update)
            num_damaged += bool(damage)
            for line in damage or [f"{folder} is whole"]:
                tqdm.write(f"DAMAGED {line}" if damage else line, file=sys.stdout)
    print(f"{len(folders) - num_damaged} of {len(folders)} whole")
    return 1 if num_damaged else 0


def _prune(arguments: argparse.Namespace) -> int:
    run = RunFolder(arguments.run)
    if not run.is_run:
        raise Fault(f"{run.path}: there is no run (no run.yaml)")
    if arguments.keep is not None and arguments.keep < 1:
        raise Fault(f"--keep = {arguments.keep}: at least 1")
    number = arguments.keep or _policy(run.path).keep_last
    with run.taken(Mesh(0, 1, 0, torch.device("cpu"))):
        newest = find_checkpoint(run.checkpoints)
        if newest is None:
            raise Fault(f"{run.path}: the run has saved no checkpoint yet")
        if newest.unread:
            told = f"{run.path}: nothing was removed; try again when the disk gives these, which may be whole:"
            raise Fault([told, *(line for lines in newest.unread.values() for line in lines)], is_passing=True)
        going = keep.superseded(run.checkpoints, newest.folder, number)
        if not arguments.dry_run:
            run.keep_newest(newest.folder, number)
    left = [folder for folder in going if folder.exists()]
    for folder in going:
        print(f"{'would go' if arguments.dry_run else 'still there' if folder in left else 'removed'}  {folder}")
    staying = [folder for folder in checkpoint_folders(run.checkpoints) if not arguments.dry_run or folder not in going]
    print(f"{len(staying)} stay")
    return 1 if left and not arguments.dry_run else 0


def _found(path: Path) -> tuple[Path, list[Path]]:
    """(the run folder, its checkpoints or the one that was named). Raises Fault if there is none."""
    if _NAMED.match(path.name) and path.is_dir():
        return path.absolute().parents[1], [path]
    folders = checkpoint_folders(path / "checkpoints")
    if not folders:
        raise Fault(f"{path}: no checkpoint is here; name a run folder that has saved, or .../checkpoints/step-...")
    return path, folders


def _plain(run: Path) -> dict[str, Any]:
    return read_mapping([str(run / "run.yaml")]) if (run / "run.yaml").is_file() else {}


def _stage_names(run: Path) -> list[str]:
    return [str(stage.get("name")) for stage in _plain(run).get("stages") or []]


def _policy(run: Path) -> Settings:
    return read_settings(Settings, _plain(run).get("checkpoint") or {}, "checkpoint")
