"""Leave the main path: a run of its own that decays from a checkpoint to a release, while the path goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.checkpoint import Checkpoint, Place, RunFolder, find_checkpoint, keep
from cpt.cli import train
from cpt.config import Fault, read_mapping, write_yaml
from cpt.data.check import open_corpora
from cpt.lineage import tree
from cpt.run import Run, branch_of, read_run, run_of
from cpt.run.beginning import place_of_child
from cpt.run.stages import corpora_of, last_rate, refuse_bad_stages

EXAMPLE = "cpt branch runs/main --at 12000 --tokens 2B --output runs/release --same-windows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt branch`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that is left, finished or not")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of the branch that are not the run's"
    )
    parser.add_argument("--at", default="latest", metavar="STEP|latest", help="its checkpoint; default: latest")
    parser.add_argument("--tokens", required=True, metavar="N", help="length of the way down, such as 2B")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN2", help="the branch's folder")
    parser.add_argument("--floor", default="0.0", metavar="RATE", help="learning rate at its end; default: 0")
    parser.add_argument("--shape", default="cosine", help="linear, cosine (default), 1-sqrt or exponential")
    parser.add_argument(
        "--same-windows", action="store_true",
        help="train on the windows that RUN takes after the checkpoint itself, in their order; "
        "otherwise on such as its lineage has not read",
    )  # fmt: skip
    parser.add_argument("--train", action="store_true", help="start at once, in one process")


def run(arguments: argparse.Namespace) -> int:
    """Make the branch's folder with its `run.yaml`, and print how to start it; or start it."""
    path, output = arguments.run, arguments.output
    tree.read_lineage(path)  # a Fault if it is no run
    above = read_run([str(path / "run.yaml")])
    checkpoint = _checkpoint(path, arguments.at)
    left = checkpoint.state["progress"]
    _refuse_used(output)
    schedule = {"name": "branch", "floor": arguments.floor, "shape": arguments.shape}
    plain = read_mapping([str(path / "run.yaml")])
    mapping = branch_of(
        path, plain, left, output, arguments.tokens, schedule, continues=arguments.same_windows
    )  # fmt: skip
    branch = run_of(read_mapping(arguments.settings, mapping))
    open_corpora(corpora_of(branch), branch.model.vocabulary, branch.tokenizer, branch.is_within_documents)
    place = place_of_child(branch, checkpoint.state)
    refuse_bad_stages(branch, place)
    if arguments.same_windows:
        _refuse_other_stages_windows(above, Place.from_json(checkpoint.state), branch)
    RunFolder(output).make()
    write_yaml(branch, output / "run.yaml", "Every setting of this branch; cpt train FILE starts it.")
    tree.write_lineage(output, tree.Parent(path, left["step"], left["tokens"], checkpoint.state["rate"]))
    _tell(above, branch, checkpoint, place)
    if arguments.train:
        return train.run(argparse.Namespace(settings=[str(output / "run.yaml")], local_rank=None))
    print(f"cpt train {output / 'run.yaml'}")
    return 0


def _checkpoint(path: Path, at: str) -> Checkpoint:
    """The checkpoint that the branch leaves from."""
    if at != "latest" and not at.isdigit():
        raise Fault(f"--at {at}: a step, or latest")
    checkpoints = RunFolder(path).checkpoints
    try:
        found = find_checkpoint(checkpoints, at) if checkpoints.is_dir() else None
    except Fault as fault:
        way_out = (
            "a run keeps its last few (checkpoint.keep_last), for ever those of keep_every_tokens and keep_at_tokens"
        )
        raise Fault(f"{fault}; {way_out}") from None
    if found is None:
        raise Fault(f"{path} has saved no checkpoint yet")
    return found


def _refuse_used(output: Path) -> None:
    """Raise Fault if there is something in the place of the branch's folder."""
    RunFolder(output).refuse_other_contents()
    if RunFolder(output).is_run:
        raise Fault(f"--output {output}: there is a run already; name another folder")


def _refuse_other_stages_windows(above: Run, left: Place, branch: Run) -> None:
    """Raise Fault if the path would change its data on the way that the branch goes."""
    number = left.progress.stage
    if number + 1 >= len(above.stages):
        return
    stage = above.stages[number]
    tokens_done = left.progress.stage_tokens
    there = above.num_slots(stage, tokens_done) * above.sequence_length - tokens_done
    if branch.total_tokens > there:
        raise Fault(
            f"--tokens: the branch takes {branch.total_tokens:,} and stage {stage.name} of {branch.parent.run} has "
            f"{there:,} left from there; branch later or for less, or leave --same-windows out"
        )


def _tell(above: Run, branch: Run, checkpoint: Checkpoint, place: Place) -> None:
    left = checkpoint.state["progress"]
    rates = f"{place.rate_before_stage:.2e} down to {last_rate(branch, 0, place.rate_before_stage):.2e}"
    print(f"{branch.output}: leaves {branch.parent.run} at step {left['step']:,} after {left['tokens']:,} tokens")
    print(f"{branch.num_steps(branch.stages[0]):,} steps, {branch.total_tokens:,} tokens, learning rate {rates}")
    folder = RunFolder(branch.parent.run)
    if not folder.is_finished and keep.mark_of(checkpoint.folder) != keep.FOR_EVER:
        print(f"{folder.path} keeps its last {above.checkpoint.keep_last} checkpoints; start before this one goes")
