"""Train the runs of a study and write its table; what is finished is not done again, what was stopped goes on.

    python configs/studies/study.py STUDY.yaml --data DIR [--output runs/studies] [--processes 2] [key=value ...]

    DIR/corpus/NAME/train.jsonl.gz, valid.jsonl.gz --cpt data build--> OUTPUT/data
    base.yaml, a seed --cpt train--> parent --child.yaml, a cell of the study, the same seed--> child
    scores of all cells and seeds --> OUTPUT/STUDY.md

A cell is one value of each factor: the new source, the share of replay, how its tokens are counted, and an arm, which
is words that change the child's settings. `key=value` changes the study: `seeds=[1,2,3]`, `new=[code]`, `scale=100`.

`scale` multiplies the computing in each run, for machines with accelerators: tokens and parameters of the blocks grow
with its root, so that a model is given as many tokens a parameter, and learning rates go down with its width.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launcher"), str(ROOT / "kernels")]

from cpt.checkpoint import RunFolder  # noqa: E402 (after the path)
from cpt.config import Fault, read_mapping, read_settings  # noqa: E402
from cpt.config.yaml_text import to_yaml  # noqa: E402
from cpt.lineage.ledger import Ledger  # noqa: E402
from cpt.parallel.mesh import num_gpus  # noqa: E402
from cpt.report import RunRecord, read_run  # noqa: E402

TOKENIZER = "tokenizers/multi-bpe-8k"
HEAD_WIDTH = 16
WAYS = {"adds_to_new": "equal new tokens", "replaces_new": "equal tokens in all"}


@dataclass(frozen=True)
class Cell:
    """One way to train a child. `accounting` is empty where nothing is replayed."""

    new: str
    share: str
    accounting: str
    arm: str

    @property
    def name(self) -> str:
        """Of its run's folder."""
        counted = f"-{self.accounting}" if self.accounting else ""
        return f"{self.new}-{self.arm}-replay-{self.share}{counted}".replace(" ", "-").replace("%", "-percent")


@dataclass(frozen=True)
class Study:
    """The factors; a file of them is a study."""

    old: str
    new: tuple[str, ...]
    replay: tuple[str, ...]
    accounting: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    scale: float = 1.0
    tokenizer: str = TOKENIZER

    def cells(self) -> list[Cell]:
        """Every cell once: without replay there is nothing to count."""
        return [
            Cell(new, share, accounting if is_replayed(share) else "", arm)
            for new in self.new
            for arm in self.arms
            for accounting in self.accounting
            for share in self.replay
            if is_replayed(share) or accounting == self.accounting[0]
        ]


def is_replayed(share: str) -> bool:
    """Whether a share is more than nothing."""
    return float(share.rstrip("%")) > 0


# ---- settings of the runs


def base_settings(study: Study, output: Path, folder: Path, seed: int) -> dict[str, Any]:
    """The parent of one seed."""
    plain = read_mapping([str(folder / "base.yaml"), f"seed={seed}", f"output={parent_of(output, seed)}"])
    return scaled(with_source(plain, study.old, output), study.scale)


def child_settings(study: Study, output: Path, folder: Path, cell: Cell, seed: int) -> dict[str, Any]:
    """The child of one cell and seed."""
    words = [f"seed={seed}", f"output={output / f'seed-{seed}' / cell.name}", f"parent.run={parent_of(output, seed)}"]
    replay = [f"stages.0.replay.share={cell.share}", f"stages.0.replay.accounting={cell.accounting}"]
    words += replay if cell.accounting else []
    plain = read_mapping([str(folder / "child.yaml"), *words, *study.arms[cell.arm]])
    return scaled(with_source(plain, cell.new, output), study.scale)


def parent_of(output: Path, seed: int) -> Path:
    """Where the parent of that seed lies."""
    return output / f"seed-{seed}" / "base"


def with_source(plain: dict[str, Any], name: str, output: Path) -> dict[str, Any]:
    """The settings with one source in the one stage, which is called so, and its held-out text."""
    (stage,) = plain["stages"]
    stage = {**stage, "name": name, "sources": {name: {"corpus": str(output / "data" / name)}}}
    held_out = {name: str(output / "data" / f"{name}-held-out")}
    return {**plain, "stages": [stage], "evaluation": {**plain["evaluation"], "held_out": held_out}}


def scaled(plain: dict[str, Any], scale: float) -> dict[str, Any]:
    """A run of `scale` times the computing."""
    if scale == 1:
        return plain
    run, wider = read_mapping([], plain), scale**0.25
    (stage,) = run["stages"]
    stage["tokens"] = round(read_settings(Tokens, {"tokens": stage["tokens"]}).tokens * scale**0.5)
    for rate in ("peak", "floor"):
        stage["schedule"][rate] = float(stage["schedule"][rate]) / wider
    model = run.get("model", {})
    for width in ("width", "mlp_width"):
        if width in model:
            model[width] = round(model[width] * wider / (2 * HEAD_WIDTH)) * 2 * HEAD_WIDTH
    if model:
        model["heads"], model["kv_heads"] = model["width"] // HEAD_WIDTH, model["width"] // HEAD_WIDTH // 2
    return run


@dataclass(frozen=True)
class Tokens:
    """A number of tokens, as settings write it."""

    tokens: int


# ---- running


def build_data(study: Study, data: Path, output: Path) -> None:
    """Corpora of all sources, those that are not there yet."""
    for name in dict.fromkeys([study.old, *study.new]):
        for part, target in (("train", name), ("valid", f"{name}-held-out")):
            if not (output / "data" / target).exists():
                text, tokenizer = data / "corpus" / name / f"{part}.jsonl.gz", data / study.tokenizer
                words = ["data", "build", text, "--tokenizer", tokenizer, "--output", output / "data" / target]
                call = "import sys; from cpt.cli import main; sys.exit(main(sys.argv[1:]))"
                subprocess.run([sys.executable, "-c", call, *map(str, words)], check=True, env=environment())


def environment(slot: int = 0) -> dict[str, str]:
    """Of a process in the slot of that number: where the package lies, and its GPU if there are any."""
    more = {"PYTHONPATH": os.pathsep.join(sys.path[:3])}
    if num_gpus():
        known = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus())))).split(",")
        more["CUDA_VISIBLE_DEVICES"] = known[slot % len(known)]
    return {**os.environ, **more}


def train_all(runs: Sequence[dict[str, Any]], num_processes: int) -> None:
    """Train these runs, so many at a time, each on an equal part of the cores. Raises Fault when one has failed."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots: SimpleQueue[int] = SimpleQueue()
    for number in range(num_processes):
        slots.put(number)
    left = [plain for plain in runs if not is_done(plain)]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them are finished", flush=True)
    failed: list[str] = []

    def train_one(plain: dict[str, Any]) -> None:
        if failed:
            return
        slot, began, output = slots.get(), time.monotonic(), Path(plain["output"])
        settings = beside(output, ".yaml")
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(to_yaml(plain), encoding="utf-8")
        mine = cores[slot::num_processes] if len(cores) >= num_processes else cores
        with beside(output, ".log").open("ab") as log:
            ended = subprocess.run(
                [sys.executable, ROOT / "launcher" / "run.py", settings],
                stdout=log, stderr=log, env=environment(slot),
                preexec_fn=(lambda: os.sched_setaffinity(0, mine)) if mine else None,
            )  # fmt: skip
        slots.put(slot)
        print(f"{output}: ended with {ended.returncode} after {time.monotonic() - began:.0f} s", flush=True)
        if ended.returncode:
            failed.append(f"{output} ended with {ended.returncode}; {log.name} says why")

    with ThreadPoolExecutor(num_processes) as pool:
        list(pool.map(train_one, left))
    if failed:
        raise Fault(failed)


def beside(output: Path, ending: str) -> Path:
    """A file beside a run's folder: its settings (.yaml), what it said (.log)."""
    return output.with_name(output.name + ending)


def is_done(plain: dict[str, Any]) -> bool:
    """Whether this run, with these settings, is finished."""
    output = Path(plain["output"])
    settings = beside(output, ".yaml")
    same = settings.is_file() and settings.read_text(encoding="utf-8") == to_yaml(plain)
    return same and RunFolder(output).is_finished


# ---- the table


@dataclass(frozen=True)
class Result:
    """What one child came to; losses in nats a token, `intervals` half the width over documents of old and new."""

    new_tokens: int
    tokens: int
    new_loss: float
    change: float
    retained: float
    intervals: tuple[float, float]


def result_of(run: RunRecord, old: str, new: str) -> Result:
    """The result of a finished child. `change`: of the old source's loss, after less before; positive: forgotten."""
    ledger = Ledger.from_json(json.loads((run.folder / "ledger.json").read_text(encoding="utf-8")))
    (entry,) = [entry for entry in ledger.entries if entry.source == new]
    scores = {name: run.scores.last_score(name) for name in (old, new)}
    before = run.scores.column(old)[0]
    return Result(
        new_tokens=entry.num_consumed * entry.sequence_length,
        tokens=run.tokens,
        new_loss=scores[new].loss,
        change=scores[old].loss - before,
        retained=(scores[old].loss + scores[new].loss) / 2,
        intervals=(scores[old].interval, scores[new].interval),
    )


def tables(study: Study, results: dict[tuple[Cell, int], Result]) -> Iterator[str]:
    """Lines of Markdown: a table for each new source, a row for each cell; the mean over seeds (lowest to highest)."""
    arm_of_reference = next(iter(study.arms))
    has_arms = len(study.arms) > 1
    for new in study.new:
        more = [f"retained less {arm_of_reference}'s"] if has_arms else []
        header = ["replay", *(["arm"] if has_arms else []), "new tokens", "tokens in all", f"loss on {new}",
                  f"change of {study.old}", "retained", f"± {study.old}, {new}", *more]  # fmt: skip
        yield from ["", f"From {study.old} to {new}:", "", row_of(header), row_of(["---"] * len(header))]
        cells = [cell for cell in study.cells() if cell.new == new]
        # By replay first, so that arms at equal replay stand together.
        order = list(dict.fromkeys((cell.share, cell.accounting) for cell in cells))
        for cell in sorted(cells, key=lambda one: order.index((one.share, one.accounting))):
            found = [results[cell, seed] for seed in study.seeds]
            rival = Cell(new, cell.share, cell.accounting, arm_of_reference)
            less = [results[cell, seed].retained - results[rival, seed].retained for seed in study.seeds]
            yield row_of(
                [
                    f"{cell.share}{', ' + WAYS[cell.accounting] if cell.accounting else ''}",
                    *([cell.arm] if has_arms else []),
                    f"{found[0].new_tokens:,}",
                    f"{found[0].tokens:,}",
                    spread([one.new_loss for one in found]),
                    spread([one.change for one in found], signed=True),
                    spread([one.retained for one in found]),
                    ", ".join(f"{max(one.intervals[i] for one in found):.3f}" for i in (0, 1)),
                    *([] if not has_arms else ["" if cell == rival else spread(less, signed=True)]),
                ]
            )
        yield ""
        yield (
            f"Nats a token; mean over seeds {', '.join(map(str, study.seeds))} (lowest to highest); ±: of single "
            "losses, half the 95 % interval over documents."
        )


def spread(numbers: Sequence[float], signed: bool = False) -> str:
    """Mean (lowest to highest)."""
    form = "+.3f" if signed else ".3f"
    mean = sum(numbers) / len(numbers)
    return f"{mean:{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def row_of(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str]) -> int:
    """Build, train, tell. 2 if the request cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="beside it lie base.yaml and child.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to the study")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with corpus/ and tokenizers/")
    parser.add_argument("--output", type=Path, default=Path("runs/studies"), metavar="DIR")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="runs at a time")
    arguments = parser.parse_intermixed_args(words)
    output, folder = arguments.output, arguments.study.parent
    try:
        study = read_settings(Study, read_mapping([str(arguments.study), *arguments.changes]))
        build_data(study, arguments.data, output)
        train_all([base_settings(study, output, folder, seed) for seed in study.seeds], arguments.processes)
        children = {(cell, seed): child_settings(study, output, folder, cell, seed)
                    for seed in study.seeds for cell in study.cells()}  # fmt: skip
        train_all(list(children.values()), arguments.processes)
        results = {(cell, seed): result_of(read_run(Path(plain["output"])), study.old, cell.new)
                   for (cell, seed), plain in children.items()}  # fmt: skip
    except Fault as fault:
        for line in fault.lines:
            print(f"study.py: {line}", file=sys.stderr)
        return 2
    text = "\n".join(tables(study, results)).strip() + "\n"
    (output / arguments.study.with_suffix(".md").name).write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
