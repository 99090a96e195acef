"""To and from Hugging Face: export with a certificate, import as a parent for runs, compare two folders.

to-hf    RUN|CHECKPOINT OUT    a folder that AutoModelForCausalLM loads, with certificate.json
from-hf  HF_DIR OUT            a folder that a run can name as its parent: parent.run=OUT
verify   A B                   whether two Hugging Face folders are the same model
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import yaml

from cpt.checkpoint import Place, RunFolder, write_checkpoint
from cpt.cli._models import open_model
from cpt.config import Fault, as_mapping
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.huggingface.load import read_folder
from cpt.huggingface.publish import publish
from cpt.huggingface.verify import verify
from cpt.lineage.ledger import Ledger
from cpt.lineage.tree import write_lineage
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Piece

EXAMPLE = "cpt convert to-hf runs/quickstart/replay models/replay --dtype fp32"

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt convert`."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="to-hf|from-hf|verify")
    out = ways.add_parser("to-hf", help="export a run or a checkpoint")
    out.add_argument("model", type=Path, metavar="RUN|CHECKPOINT")
    out.add_argument("output", type=Path, metavar="OUT")
    out.add_argument("--dtype", choices=_DTYPES, help="of the exported weights; default: the run's precision")
    into = ways.add_parser("from-hf", help="make a Hugging Face folder a parent for runs")
    into.add_argument("folder", type=Path, metavar="HF_DIR")
    into.add_argument("output", type=Path, metavar="OUT")
    same = ways.add_parser("verify", help="compare two Hugging Face folders; exit 1 if they differ")
    same.add_argument("folders", type=Path, nargs=2, metavar="HF_DIR")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say where the result lies and what the certificate found."""
    return {"to-hf": _export, "from-hf": _import, "verify": _verify}[arguments.way](arguments)


def _export(arguments: argparse.Namespace) -> int:
    trained = open_model(arguments.model)
    if trained.checkpoint is None:
        raise Fault(f"{arguments.model} is a Hugging Face folder already; name a run or a checkpoint")
    progress = trained.checkpoint.state["progress"]
    dtype = arguments.dtype or trained.run_settings.get("precision", "bf16")
    certificate = publish(
        trained.name,
        trained.settings,
        trained.weights,
        arguments.output,
        dtype=_DTYPES[dtype],
        tokenizer_folder=trained.tokenizer,
        probe_tokens=trained.windows_of_held_out(),
        lineage={"run": trained.run.name, "step": progress["step"], "tokens": progress["tokens"]},
    )
    probe = certificate["probe"]
    print(f"exported {arguments.output} ({dtype}); certificate.json says:")
    print(f"  loss {probe['loss_trained']:.6f} as trained, {probe['loss_transformers']:.6f} under transformers")
    print(
        f"  top-1 agreement {probe['top_1_agreement']:.2%}, "
        f"largest logit difference {probe['largest_logit_difference']:.2e}"
    )
    return 0


def _import(arguments: argparse.Namespace) -> int:
    name, settings, weights = read_folder(arguments.folder)
    folder = RunFolder(arguments.output)
    if folder.path.exists():
        raise Fault(f"{folder.path} is there already; name another folder, or remove it")
    folder.make()
    try:
        pieces, values = [], []
        for parameter, shape in settings.shapes.items():
            values.append(weights[parameter].float().reshape(-1))
            pieces.append(Piece(parameter, shape, 0, len(values[-1]), values[-1], {}, is_copy=False))
        state = {**Place().as_json(Ledger()), "optimizer_updates": 0, "methods": {}}
        target = folder.checkpoint_at(0)
        write_checkpoint(target, pieces, {"master": values}, state, Mesh(0, 1, 0, torch.device("cpu")))
        folder.keep_newest(target, 1)
        (folder.path / "tokenizer").mkdir()
        Tokenizer.open(arguments.folder).copy_to(folder.path / "tokenizer")
        write_lineage(folder.path, None)
        folder.write_json("ledger.json", Ledger().as_json())
        (folder.path / "run.yaml").write_text(
            f"# Weights of {arguments.folder.name}, no training of ours.\n"
            + yaml.safe_dump({"model": {"name": name, **as_mapping(settings)}}, sort_keys=False),
            encoding="utf-8",
        )
        folder.finish(0, 0)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    print(f"imported {arguments.folder} ({name}, {settings.num_parameters:,} parameters) to {folder.path}")
    print(
        f"continue it with   parent: {{run: {folder.path}}}   "
        f"and corpora built with --tokenizer {folder.path}/tokenizer"
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    differences = verify(*arguments.folders)
    for line in differences:
        print(line)
    print("DIFFERENT" if differences else "SAME: configuration, every tensor bit for bit, and the tokenizer's files")
    return 1 if differences else 0
