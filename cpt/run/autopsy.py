"""What a bad step was made of, for a person: `autopsy/step-NNNNNNNN.json`, its numbers, windows and their text."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from cpt.config import Fault
from cpt.data.loader import read_windows
from cpt.data.order import StageOrder, Windows
from cpt.data.prepare.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# A step of 4M tokens would be 20 MB of text, and a person reads the first windows only.
_MOST_TEXTS = 64
_MOST_CHARACTERS = 4000


def autopsy_of(run: Path, step: int) -> Path:
    """Where the autopsy of the step of that number lies, in the folder of a run."""
    return run / "autopsy" / f"step-{step:08d}.json"


def write_autopsy(run: Path, step: int, numbers: dict[str, Any], order: StageOrder, first_slot: int, windows: Windows):
    """Put down what is known of a bad step; `numbers` are told as they are. One rank calls it.

    Every window is named; the first 64 are there as text too, up to 4,000 characters each, if the run has a tokenizer.
    Raises nothing: why the run ends, or goes back, must be told though the disk or a corpus fails.
    """
    path = autopsy_of(run, step)
    names, corpora = order.source_names, order.corpora
    epochs = order.epochs(first_slot, len(windows.stream)).tolist()
    pairs = zip(windows.stream.tolist(), windows.first_token.tolist(), epochs, strict=True)
    named = [
        {"slot": order.slot_of_stage(first_slot) + index, "source": names[s], "first_token": first, "epoch": epoch}
        for index, (s, first, epoch) in enumerate(pairs)
    ]
    told = {
        "step": step,
        **{key: _plain(value) for key, value in numbers.items()},
        "corpora": {names[stream]: str(corpora[stream].path) for stream in sorted(set(windows.stream.tolist()))},
        "windows": [{**window, **text} for window, text in zip(named, _texts(run, order, windows), strict=True)],
    }
    aside = path.with_name(f".{path.name}.aside")
    try:
        path.parent.mkdir(exist_ok=True)
        aside.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        _log.error("%s cannot be written: %s; its windows: %s", path, error.strerror, named)


def _plain(value: Any) -> Any:
    """As JSON knows it: a number that is not finite as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _texts(run: Path, order: StageOrder, windows: Windows) -> list[dict[str, str]]:
    """The text of each window, or why there is none; nothing for windows beyond the first ones."""
    number = min(len(windows.stream), _MOST_TEXTS)
    nothing: list[dict[str, str]] = [{} for _ in range(len(windows.stream) - number)]
    if not (run / "tokenizer").is_dir():
        return [{} for _ in range(number)] + nothing
    tokens = np.zeros((number, order.sequence_length + 1), dtype=np.int32)
    try:
        tokenizer = Tokenizer.open(run / "tokenizer")
        read_windows(order, windows.stream[:number], windows.first_token[:number], tokens)
        return [{"text": tokenizer.decode(row)[:_MOST_CHARACTERS]} for row in tokens] + nothing
    # The tokenizers' libraries raise nothing narrower on ids that they do not know.
    except (Fault, OSError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        return [{"text_missing": str(error)} for _ in range(number)] + nothing
