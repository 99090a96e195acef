"""Measure this project beside others that do the same job, on this machine.

`cpt bench data` reads shuffled samples of one text with our loader and with each peer that is installed:
megatron-core, litdata, mosaicml-streaming, datasets.
`cpt bench convert` imports and exports a Hugging Face folder of random weights, beside transformers' load and save.
`cpt bench checkpoint` saves while a model trains, beside dd, torch.distributed.checkpoint and DeepSpeed's own save.
`cpt bench optimizer` updates a shard on the CPU, beside the passes over memory that DeepSpeed makes of an update.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cpt.benchmarks import checkpoint, convert, optimizer
from cpt.benchmarks.data import Settings, compare
from cpt.benchmarks.table import as_json, as_lines
from cpt.config import read_settings
from cpt_launcher.rendezvous import pick_free_port

EXAMPLE = "cpt bench data --tokens 50M --batch 64,256 --json bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    data = commands.add_parser(
        "data",
        help="compare how fast samples of text are read",
        description="Compare how fast samples of text are read.",
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    data.add_argument("corpus", nargs="?", type=Path, metavar="CORPUS", help="text to read (default: random tokens)")
    data.add_argument("--sequence-length", default=defaults.sequence_length, metavar="S", help="(default: %(default)s)")
    data.add_argument(
        "--batch",
        default=",".join(map(str, defaults.batch)),
        metavar="B,B",
        help="samples at once, for readers that give batches; peers take the first (default: %(default)s)",
    )
    data.add_argument("--tokens", default="50M", metavar="N", help="length of the text that is read (default: 50M)")
    data.add_argument("--order-tokens", default="1B", metavar="N", help="of the order whose start-up is timed (1B)")
    data.add_argument("--repetitions", default=defaults.repetitions, metavar="N", help="(default: %(default)s)")
    data.add_argument("--folder", type=Path, metavar="DIR", help="for large files, which go away again (default: /tmp)")
    data.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    _add_convert(commands)
    _add_checkpoint(commands)
    _add_optimizer(commands)


def _add_convert(commands) -> None:
    defaults = convert.Settings()
    parser = commands.add_parser(
        "convert",
        help="compare how fast models are imported and exported, and in how much memory",
        description="Compare how fast models are imported and exported, and in how much memory.",
    )
    parser.add_argument(
        "--shape", default=defaults.shape, help=f"of {', '.join(convert.SHAPES)} (default: %(default)s)"
    )
    parser.add_argument("--repetitions", default=defaults.repetitions, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="which holds the whole model in memory")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for large files, which go away again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def _add_checkpoint(commands) -> None:
    defaults = checkpoint.Settings()
    parser = commands.add_parser(
        "checkpoint",
        help="compare how fast checkpoints are written and read, and how long training waits",
        description="Compare how fast checkpoints are written and read, and how long training waits.",
    )
    parser.add_argument("--gigabytes", default=defaults.gigabytes, metavar="N", help="saved (default: %(default)s)")
    parser.add_argument("--length", default=defaults.length, metavar="N", help="tokens of a step (%(default)s)")
    parser.add_argument("--repetitions", default=defaults.repetitions, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="dd and ours alone")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure; files go away again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def _add_optimizer(commands) -> None:
    defaults = optimizer.Settings()
    parser = commands.add_parser(
        "optimizer",
        help="compare ways to update parameters on the CPU",
        description="Compare ways to update parameters on the CPU.",
    )
    parser.add_argument("--parameters", default=defaults.parameters, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repetitions", default=defaults.repetitions, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the tables."""
    commands = {"data": _data, "convert": _convert, "checkpoint": _checkpoint, "optimizer": _optimizer}
    return commands[arguments.bench_command](arguments)


def _optimizer(arguments: argparse.Namespace) -> int:
    mapping = {name: getattr(arguments, name) for name in ("parameters", "repetitions")}
    settings = read_settings(optimizer.Settings, mapping)
    updates = optimizer.compare(settings)
    print("\n".join(optimizer.as_lines(settings, updates)))
    if arguments.json:
        arguments.json.write_text(json.dumps(optimizer.as_json(settings, updates), indent=2) + "\n", encoding="utf-8")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    mapping = {"shape": arguments.shape, "repetitions": arguments.repetitions}
    settings = read_settings(convert.Settings, {**mapping, "transformers": not arguments.no_transformers})
    result = convert.compare(settings, arguments.folder)
    print("\n".join(convert.as_lines(settings, *result)))
    if arguments.json:
        arguments.json.write_text(json.dumps(convert.as_json(settings, *result), indent=2) + "\n", encoding="utf-8")
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    mapping = {name: getattr(arguments, name) for name in ("gigabytes", "length", "repetitions")}
    settings = read_settings(checkpoint.Settings, {**mapping, "peers": not arguments.no_peers})
    result = checkpoint.compare(settings, arguments.folder, pick_free_port())
    print("\n".join(checkpoint.as_lines(result)))
    if arguments.json:
        arguments.json.write_text(json.dumps(checkpoint.as_json(result), indent=2) + "\n", encoding="utf-8")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    asked = ("sequence_length", "tokens", "order_tokens", "repetitions")
    mapping = {name: getattr(arguments, name) for name in asked}
    settings = read_settings(Settings, {**mapping, "batch": arguments.batch.split(",")})
    result = compare(arguments.corpus, settings, arguments.folder)
    print("\n".join(as_lines(result)))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(result), indent=2) + "\n", encoding="utf-8")
    return 0
