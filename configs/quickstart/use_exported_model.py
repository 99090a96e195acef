"""The exported folder as its users see it: loaded by transformers alone, scored on held-out text, and asked to write.

    python configs/quickstart/use_exported_model.py MODEL_FOLDER RUN_FOLDER

Exit status 1 if the loss on the run's held-out text is not the trained model's within 1e-3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt.data.corpus import Corpus
from cpt_kernels.cross_entropy import IGNORED
from cpt_kernels.documents import model_inputs

PROMPT = "def read_file(path):\n"
LARGEST_DIFFERENCE = 1e-3


def main(model_folder: Path, run_folder: Path) -> int:
    """Print a loss for each held-out source, beside the one that the run ended with, and a sample."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    settings = yaml.safe_load((run_folder / "run.yaml").read_text(encoding="utf-8"))
    scores = [json.loads(line) for line in (run_folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {score["source"]: score["loss"] for score in scores}  # the last of each source stays
    is_same = True
    for source, path in settings["evaluation"]["held_out"].items():
        loss = loss_under_transformers(
            model, Corpus.open(path), settings["sequence_length"], settings["evaluation"]["windows"]
        )
        difference = abs(loss - trained[source])
        is_same &= difference < LARGEST_DIFFERENCE
        print(f"held-out {source}: loss {loss:.6f} under transformers, {trained[source]:.6f} at the end of the run, "
              f"difference {difference:.1e}")  # fmt: skip
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    written = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    print(
        f"a sample, after {PROMPT!r}:\n"
        + "\n".join(f"    {line}" for line in tokenizer.decode(written[0]).splitlines())
    )
    if not is_same:
        print(
            f"the exported model is not the trained one: a loss differs by {LARGEST_DIFFERENCE} or more",
            file=sys.stderr,
        )
    return 0 if is_same else 1


@torch.no_grad()
def loss_under_transformers(model: torch.nn.Module, corpus: Corpus, length: int, num_windows: int) -> float:
    """Mean loss in nats a token over the same evenly spread windows that the run scores, each document by itself."""
    there = corpus.num_windows(length)
    ids = np.arange(min(there, num_windows)) * there // min(there, num_windows)
    tokens = torch.from_numpy(corpus.windows(ids, length))
    starts = torch.from_numpy(corpus.document_starts(ids * length, length + 1))
    total, number = 0.0, 0
    for window, begins in zip(tokens.split(1), starts.split(1), strict=True):
        inputs, targets, documents = model_inputs(window, begins, torch.device("cpu"))
        logits = model(inputs, position_ids=documents.positions, attention_mask=documents.is_visible).logits
        total += float(cross_entropy(logits[0], targets[0], ignore_index=IGNORED, reduction="sum"))
        number += int((targets != IGNORED).sum())
    return total / number


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
