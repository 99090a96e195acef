"""Score a run, a checkpoint or a Hugging Face folder on corpora: loss, perplexity, bits per byte."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from cpt.cli._models import TrainedModel, open_model
from cpt.config import Fault
from cpt.data.check import open_corpora
from cpt.evaluation.held_out import HeldOut
from cpt.parallel.mesh import Mesh
from cpt_kernels.documents import model_inputs

EXAMPLE = "cpt evaluate runs/quickstart/replay --corpora runs/quickstart/data/prose-held-out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `cpt evaluate`."""
    parser.add_argument("model", type=Path, metavar="RUN|CHECKPOINT|HF_DIR")
    parser.add_argument("--corpora", type=Path, nargs="+", metavar="CORPUS", help="default: the run's held-out ones")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="windows of each corpus; default: all")
    parser.add_argument("--sequence-length", type=int, metavar="S", help="default: the run's, or 2048 at most")
    parser.add_argument(
        "--attention",
        choices=("within_document", "across_documents"),
        help="whether a token sees earlier documents of its window; default: the run's setting, or the model's custom",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print one line a corpus."""
    trained = open_model(arguments.model)
    paths = _by_name(arguments.corpora or []) or trained.held_out()
    if not paths:
        raise Fault("--corpora is not given, and no held-out corpus of the run is there; name at least one corpus")
    longest = trained.settings.longest_sequence
    length = trained.run_settings.get("sequence_length", min(2048, longest))
    if arguments.sequence_length is not None:
        length = arguments.sequence_length
    faults = [] if arguments.windows >= 0 else [f"--windows = {arguments.windows}: at least 1, or 0 for all"]
    if not 1 <= length <= longest:
        faults.append(f"--sequence-length = {length}: the model takes up to {longest}, and at least 1")
    if faults:
        raise Fault(faults)
    named = {f"--corpora {path}": path for path in paths.values()}
    open_corpora(named, trained.settings.vocabulary, trained.tokenizer if trained.run else None)
    model = trained.built()
    device = next(model.parameters()).device

    @torch.no_grad()
    def token_losses(tokens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        return model(*model_inputs(tokens, starts, device)).cpu()

    within_documents = _is_within_documents(arguments.attention or trained.run_settings.get("attention"), trained)
    table = {}
    for name, path in paths.items():
        held_out = HeldOut(path, length, arguments.windows, within_documents)
        found = held_out.score(token_losses, Mesh(0, 1, 0, torch.device("cpu")), 16)
        table[name] = {
            "loss": found.loss,
            "interval": found.interval,
            "interval_over": found.interval_over,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.num_tokens,
        }
    if arguments.json:
        print(json.dumps({"model": str(arguments.model), "sequence_length": length, "scores": table}, indent=1))
        return 0
    print(f"{'corpus':<28} {'loss':>9} {'95 %':>8} {'over':>16} {'perplexity':>11} {'bits/byte':>10} {'tokens':>12}")
    for name, row in table.items():
        bits = f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] is not None else "unknown"
        interval = f"±{row['interval']:.4f}" if row["interval"] is not None else "unknown"
        print(
            f"{name:<28} {row['loss']:>9.4f} {interval:>8} {row['interval_over']:>16} {math.exp(row['loss']):>11.2f} "
            f"{bits:>10} {row['tokens']:>12,}"
        )
    return 0


def _is_within_documents(attention: str | None, trained: TrainedModel) -> bool:
    """Whether attention stays within a document, as asked or else as the model's family was trained."""
    if attention is None:
        return not trained.settings.attends_across_documents
    return attention == "within_document"


def _by_name(paths: list[Path]) -> dict[str, Path]:
    """The corpora by the names of their folders; by their whole paths where two folders have one name."""
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}
