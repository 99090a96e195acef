"""To and from Hugging Face: export with a certificate, import as a parent for runs, compare two models.

to-hf    RUN|CHECKPOINT OUT    a folder that AutoModelForCausalLM loads, with certificate.json
from-hf  HF_DIR OUT            a folder that a run can name as its parent: parent.run=OUT
verify   A B                   whether two models are the same; each a run, a checkpoint or a Hugging Face folder
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml

from cpt.checkpoint import Place, RunFolder, write_first
from cpt.cli._models import TrainedModel, open_model
from cpt.config import Fault, as_mapping
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface.export import aside, check_room, open_tokenizer, told_as_fault
from cpt.huggingface.load import FolderWeights, read_folder
from cpt.huggingface.origin import FILE_NAME as ORIGIN
from cpt.huggingface.origin import Origin
from cpt.huggingface.publish import publish
from cpt.huggingface.readers import count_not_finite, name_of_dtype
from cpt.huggingface.verify import Subject, examine
from cpt.lineage.ledger import Ledger
from cpt.lineage.tree import write_lineage
from cpt.tensor_writer import Layout, Writer, in_order

EXAMPLE = "cpt convert to-hf runs/quickstart/replay models/replay --dtype fp32"

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt convert`."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="to-hf|from-hf|verify")
    out = ways.add_parser("to-hf", help="export a run or a checkpoint")
    out.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    out.add_argument("output", type=Path, metavar="OUT")
    out.add_argument(
        "--dtype", choices=_DTYPES, help="of the exported weights; default: the run's precision, or as it was imported"
    )
    out.add_argument(
        "--max-shard-size",
        type=num_bytes,
        metavar="SIZE",
        help="of a weight file, as in 5GB or 500MB; default: 5GB, or the files that were imported",
    )
    out.add_argument(
        "--vocabulary",
        metavar="N|tokenizer",
        help="keep only the first N rows of the embedding and the head, or as many as the tokenizer has tokens; "
        "default: all",
    )
    into = ways.add_parser("from-hf", help="make a Hugging Face folder a parent for runs")
    into.add_argument("folder", type=Path, metavar="HF_DIR")
    into.add_argument("output", type=Path, metavar="OUT")
    same = ways.add_parser("verify", help="compare two models; exit 1 if they differ")
    same.add_argument("models", type=Path, nargs=2, metavar="RUN|CHECKPOINT|HF_DIR")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say where the result lies and what the certificate found."""
    return {"to-hf": _export, "from-hf": _import, "verify": _verify}[arguments.way](arguments)


def _export(arguments: argparse.Namespace) -> int:
    trained = open_model(arguments.model)
    if trained.checkpoint is None:
        raise Fault(f"{arguments.model} is a Hugging Face folder already; name a run or a checkpoint")
    progress = trained.checkpoint.state["progress"]
    origin = _origin_of(trained)
    asked = arguments.dtype or trained.run_settings.get("precision") or (None if origin else "bf16")
    certificate = publish(
        trained.name,
        trained.settings,
        trained.weights,
        arguments.output,
        dtype=_DTYPES[asked] if asked else None,
        tokenizer_folder=trained.tokenizer,
        probe_tokens=trained.windows_of_held_out(),
        max_shard_bytes=arguments.max_shard_size,
        vocabulary=_vocabulary(arguments.vocabulary, trained),
        lineage={"run": trained.run.name, "step": progress["step"], "tokens": progress["tokens"]},
        origin=origin,
    )
    probe = certificate["probe"]
    dtype = asked or _short_name(certificate["dtype"])
    print(f"exported {arguments.output} ({dtype}); certificate.json says:")
    print(f"  loss {probe['loss_trained']:.6f} as trained, {probe['loss_transformers']:.6f} under transformers")
    print(
        f"  top-1 agreement {probe['top_1_agreement']:.2%}, "
        f"largest logit difference {probe['largest_logit_difference']:.2e}"
    )
    _tell_rows(trained, certificate)
    return 0


def _origin_of(trained: TrainedModel) -> Origin | None:
    """The layout that its weights came in, while nothing is trained on them."""
    file = trained.run / ORIGIN
    if not file.is_file() or trained.checkpoint.state["progress"]["step"]:
        return None
    try:
        return Origin.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{file} is damaged ({error!r}); remove it, and the files get a layout of their own") from None


def _vocabulary(asked: str | None, trained: TrainedModel) -> int | None:
    if asked == "tokenizer":
        if trained.tokenizer is None:
            raise Fault("--vocabulary tokenizer: the run has no tokenizer folder; give a number")
        return Tokenizer.open(trained.tokenizer).vocabulary_size
    if asked is not None and not (asked.isdecimal() and int(asked)):
        raise Fault(f"--vocabulary {asked}: expected a number of rows, or the word tokenizer")
    return int(asked) if asked else None


def _tell_rows(trained: TrainedModel, certificate: Mapping[str, object]) -> None:
    if certificate["rows_removed"]:
        print(f"  {certificate['rows_removed']} rows without a token removed")
    elif trained.tokenizer is not None:
        num_tokens = Tokenizer.open(trained.tokenizer).vocabulary_size
        if num_tokens < trained.settings.vocabulary:
            print(
                f"  {trained.settings.vocabulary - num_tokens} of {trained.settings.vocabulary} rows have no token, "
                "and are kept; --vocabulary tokenizer removes them"
            )


def _import(arguments: argparse.Namespace) -> int:
    name, settings, weights = read_folder(arguments.folder)
    open_tokenizer(arguments.folder, settings.vocabulary)
    if arguments.output.exists():
        raise Fault(f"{arguments.output} is there already; name another folder, or remove it")
    with aside(arguments.output) as path, told_as_fault(path):
        folder = RunFolder(path)
        state = {**Place().as_json(Ledger()), "optimizer_updates": 0, "methods": {}}
        target = folder.checkpoint_at(0)
        write_first(target, settings.shapes, lambda *given: _write_masters(*given, weights), state)
        folder.keep_newest(target, 1)
        Tokenizer.open(arguments.folder).copy_to(path / "tokenizer")
        folder.write_json(ORIGIN, Origin.of_folder(arguments.folder, weights).as_json())
        folder.write_json("ledger.json", Ledger().as_json())
        (path / "run.yaml").write_text(
            f"# Weights of {arguments.folder.name}, no training of ours.\n"
            + yaml.safe_dump({"model": {"name": name, **as_mapping(settings)}}, sort_keys=False),
            encoding="utf-8",
        )
        write_lineage(path, None, arguments.folder.absolute())
        folder.finish(0, 0)
    print(f"imported {arguments.folder} ({name}, {settings.num_parameters:,} parameters) to {arguments.output}")
    print(
        f"continue it with   parent: {{run: {arguments.output}}}   "
        f"and corpora built with --tokenizer {arguments.output}/tokenizer"
    )
    return 0


def _write_masters(
    file: Path, keys: Mapping[str, str], observe: Callable[[memoryview], object], weights: FolderWeights
) -> None:
    """The file of pieces of a step-0 checkpoint.

    In the types of the folder: fp32 would be the same numbers in twice the bytes, and who reads a master gets fp32.
    """
    readers = {name: weights.reader(name) for name in keys}
    layout = Layout.of_tensors({keys[name]: (r.dtype, (math.prod(r.shape),)) for name, r in readers.items()})
    check_room(file.parent, layout.num_bytes)
    names = {key: name for name, key in keys.items()}
    with Writer(file, layout, observe) as writer:
        for key in in_order(layout):
            writer.write(key, _finite(weights, names[key]))


def _finite(weights: FolderWeights, name: str) -> Callable[[int, torch.Tensor], None]:
    reader = weights.reader(name)

    def read_into(start: int, out: torch.Tensor) -> None:
        reader.read_into(start, out)
        if num_bad := count_not_finite(out):
            raise Fault(f"tensor {weights.theirs(name)}: {num_bad} values or more are NaN or infinite")

    return read_into


def _verify(arguments: argparse.Namespace) -> int:
    models = [open_model(path) for path in arguments.models]
    windows = next((one.windows_of_held_out() for one in models if one.held_out()), None)
    verdict = examine(*(_subject(*pair) for pair in zip(arguments.models, models, strict=True)), windows)
    for line in verdict.differences:
        print(line)
    if probe := verdict.probe:
        print(
            f"on {probe.num_tokens:,} tokens: loss {probe.losses[0]:.6f} and {probe.losses[1]:.6f}, top-1 agreement "
            f"{probe.top_1_agreement:.2%}, largest logit difference {probe.largest_logit_difference:.2e}"
        )
    if verdict.differences:
        print("DIFFERENT")
        return 1
    removed = f", {verdict.rows_removed} rows without a token removed" if verdict.rows_removed else ""
    print(f"SAME: configuration, all {verdict.num_tensors} tensors bit for bit{removed}, and the tokenizer's files")
    return 0


def _subject(path: Path, model: TrainedModel) -> Subject:
    folder = path if model.checkpoint is None else None
    return Subject(model.name, model.settings, model.weights, model.tokenizer, folder)


def num_bytes(text: str) -> int:
    """Bytes in words such as 5GB, 500MB or 4GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = match and int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 500MB")
    return size


def _short_name(dtype: str) -> str:
    return next((short for short, known in _DTYPES.items() if name_of_dtype(known) == dtype), dtype)
