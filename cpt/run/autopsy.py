"""What a bad step was made of, for a person: `autopsy/step-NNNNNNNN.json`, its numbers, windows and their text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt.config import Fault, write_in_place
from cpt.data.loader import read_windows
from cpt.data.order import StageOrder, Windows
from cpt.data.prepare.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# A step of 4M tokens would be 20 MB of text, and a person reads some of the windows only.
_MOST_TEXTS = 64
_MOST_CHARACTERS = 4000


def autopsy_of(run: Path, step: int) -> Path:
    """Where the autopsy of the step of that number lies, in the folder of a run."""
    return run / "autopsy" / f"step-{step:08d}.json"


def write_autopsy(
    run: Path,
    step: int,
    numbers: dict[str, Any],
    order: StageOrder,
    first_slot: int,
    windows: Windows,
    losses: Sequence[float],
) -> None:
    """Put down what is known of a bad step; `numbers` are told as they are. One rank calls it.

    Every window is named, with its loss of `losses`; of the 64 with the highest, those that are not finite first, there
    is the text too, up to 4,000 characters each, if the run has a tokenizer.
    Raises nothing: why the run ends, or goes back, must be told though the disk or a corpus fails.
    """
    path = autopsy_of(run, step)
    names, corpora = order.source_names, order.corpora
    epochs = order.epochs(first_slot, len(windows.stream)).tolist()
    rows = zip(windows.stream.tolist(), windows.first_token.tolist(), epochs, map(_plain, losses), strict=True)
    named = [
        {"slot": order.slot_of_stage(first_slot) + index, "source": names[s], "first_token": first, "epoch": epoch,
         "loss": loss}
        for index, (s, first, epoch, loss) in enumerate(rows)
    ]  # fmt: skip
    shown = _worst(losses)
    for index, text in zip(shown, _texts(run, order, windows, shown), strict=True):
        named[index] |= text
    told = {
        "step": step,
        **{key: _plain(value) for key, value in numbers.items()},
        "corpora": {names[stream]: str(corpora[stream].path) for stream in sorted(set(windows.stream.tolist()))},
        "windows": named,
    }
    try:
        path.parent.mkdir(exist_ok=True)
        write_in_place(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        _log.error("%s cannot be written: %s; its windows: %s", path, error.strerror, named)


def _plain(value: Any) -> Any:
    """As JSON knows it: a number that is not finite as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _worst(losses: Sequence[float]) -> list[int]:
    """Which windows are shown as text: all, or those with the highest losses; if all are alike, from all over it."""
    number = len(losses)
    if number <= _MOST_TEXTS:
        return list(range(number))
    heights = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if min(heights) == max(heights):
        return [index * (number - 1) // (_MOST_TEXTS - 1) for index in range(_MOST_TEXTS)]
    return sorted(sorted(range(number), key=lambda index: -heights[index])[:_MOST_TEXTS])


def _texts(run: Path, order: StageOrder, windows: Windows, shown: list[int]) -> list[dict[str, str]]:
    """The text of each of the windows of these numbers, or why there is none."""
    if not (run / "tokenizer").is_dir():
        return [{} for _ in shown]
    tokens = np.zeros((len(shown), order.sequence_length + 1), dtype=np.int32)
    try:
        tokenizer = Tokenizer.open(run / "tokenizer")
        read_windows(order, windows.stream[shown], windows.first_token[shown], tokens)
        return [{"text": tokenizer.decode(row)[:_MOST_CHARACTERS]} for row in tokens]
    # The tokenizers' libraries raise nothing narrower on ids that they do not know.
    except (Fault, OSError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        return [{"text_missing": str(error)} for _ in shown]
