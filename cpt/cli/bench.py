"""Measure this project beside others that do the same job, on this machine.

`cpt bench data` reads shuffled samples of one text with our loader and with each peer that is installed:
megatron-core, litdata, mosaicml-streaming, datasets.
`cpt bench convert` imports and exports a Hugging Face folder of random weights, beside transformers' load and save.
`cpt bench checkpoint` saves while a model trains, beside dd, torch.distributed.checkpoint and DeepSpeed's own save.
`cpt bench optimizer` updates a shard on the CPU, beside the passes over memory that DeepSpeed makes of an update.
`cpt bench kernels` times each operation of a step: our twins, torch.compile and each library that is installed.
`cpt bench step` times whole training steps: ours, and transformers' models under the same DeepSpeed.
`cpt bench reptile` makes Reptile's outer step, beside a step of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import ModuleType

from cpt.benchmarks import checkpoint, convert, data, kernels, optimizer, outer_step, step
from cpt.benchmarks.options import add_options, given_options
from cpt.benchmarks.table import around_region, write_region
from cpt.config import read_settings

EXAMPLE = "cpt bench data --tokens 50M --batch 64,256 --json bench.json"

# A benchmark is a file with Settings, compare(settings) -> a dataclass, and as_lines(result); its first line is its
# help. `region(settings)`, where it has one, says which part of a document its tables are.
_BENCHES: dict[str, ModuleType] = {
    "data": data,
    "convert": convert,
    "checkpoint": checkpoint,
    "optimizer": optimizer,
    "kernels": kernels,
    "step": step,
    "reptile": outer_step,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    for name, bench in _BENCHES.items():
        described = (bench.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=described.splitlines()[0],
            description=described,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(command, bench.Settings)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
        command.add_argument(
            "--markdown", type=Path, metavar="FILE", help="write the tables between their two marks in here too"
        )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the tables."""
    name = arguments.bench_command
    bench = _BENCHES[name]
    settings = read_settings(bench.Settings, given_options(bench.Settings, vars(arguments)))
    region = bench.region(settings) if hasattr(bench, "region") else f"cpt bench {name}"
    if arguments.markdown:  # before minutes are spent
        around_region(arguments.markdown, region)
    result = bench.compare(settings)
    lines = bench.as_lines(result)
    print("\n".join(lines))
    if arguments.json:
        text = json.dumps(dataclasses.asdict(result), indent=2, default=str)
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    if arguments.markdown:
        write_region(arguments.markdown, region, lines)
    return 0
