"""The exported folder as its users see it: loaded by transformers alone, scored on held-out text, and asked to write.

    python configs/quickstart/use_exported_model.py MODEL_FOLDER RUN_FOLDER

Exit status 1 if the loss on the run's held-out text is not the trained model's within 1e-3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt.data.corpus import Corpus

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
    """Mean loss in nats a token over the same evenly spread windows that the run scores."""
    there = corpus.num_windows(length)
    number = min(there, num_windows)
    tokens = torch.from_numpy(corpus.windows(torch.arange(number).numpy() * there // number, length))
    losses = [model(input_ids=window, labels=window).loss.double() for window in tokens.split(1)]
    return float(torch.stack(losses).mean())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
