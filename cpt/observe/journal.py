"""What a run tells while it trains: a line and a metrics record a step, a line and a record an evaluation."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpt.observe.attempts import note_attempt
from cpt.observe.records import Records
from cpt.observe.speed import as_duration

_log = logging.getLogger(__name__)

# What of a run's time the records of a step and of an evaluation stand for.
_SECONDS = ("step_seconds", "save_seconds", "evaluation_seconds")


class Journal:
    """Writes the `.jsonl` files of a run folder, on the first rank; on the others it does nothing.

    Lines after step `keep_until_step` are dropped, and `attempts.jsonl` says how much work that was. On a terminal a
    progress bar stands for the step lines, which then go to the log file alone; elsewhere every `every_steps`-th line
    is shown.
    """

    def __init__(
        self, folder: Path, is_first: bool, keep_until_step: int, total_tokens: int, tokens_done: int, every_steps: int
    ) -> None:
        self._folder, self._files = folder, {}
        self._every_steps = every_steps
        self._total_tokens = total_tokens
        self._has_bar = is_first and sys.stderr.isatty()
        self._scored: set[tuple[int, str]] = set()
        if is_first:
            self._open(keep_until_step)
            self._note_lost_work(folder)
        self._bar = tqdm(
            total=total_tokens, initial=tokens_done, unit="tok", unit_scale=True, disable=not self._has_bar, leave=False
        )

    def _open(self, keep_until_step: int) -> None:
        names = ("metrics", "scores", "order")
        self._files = {name: Records(self._folder / f"{name}.jsonl", keep_until_step) for name in names}
        self._scored = {(record["step"], record["source"]) for record in self._files["scores"].kept}

    def _note_lost_work(self, folder: Path) -> None:
        """Note which steps and evaluations of the attempt before are made again; nothing if none are."""
        steps, scores = self._files["metrics"].dropped, self._files["scores"].dropped
        if steps or scores:
            note_attempt(folder, "resumed_over", steps=len(steps), seconds=round(self._lost_seconds(), 3))

    def _lost_seconds(self) -> float:
        """What the dropped lines stand for."""
        dropped = [*self._files["metrics"].dropped, *self._files["scores"].dropped]
        return sum(record.get(part, 0.0) for record in dropped for part in _SECONDS)

    def rewind(self, step: int, tokens: int) -> float:
        """Drop the lines after `step`, where `tokens` were done; how many seconds of work they told of.

        Raises OSError if the disk does not take what stays.
        """
        if not self._files:
            return 0.0
        for file in self._files.values():
            file.close()
        self._open(step)
        self._bar.n = tokens
        self._bar.refresh()
        return self._lost_seconds()

    def has_scored(self, step: int, source: str) -> bool:
        """Whether the score of a source at that step stands in `scores.jsonl`; False on all but the first rank."""
        return (step, source) in self._scored

    def settle(self) -> None:
        """Return when every line told so far is on the disk; raises OSError if it does not take them."""
        for file in self._files.values():
            file.keep()

    def step(self, record: dict[str, Any], num_tokens: int) -> None:
        """Tell one step; `num_tokens` were trained on in it."""
        if not self._files:
            return
        self._files["metrics"].write(record)
        self._bar.update(num_tokens)
        loss = _number(record["loss"], ".3f")
        self._bar.set_postfix_str(f"loss {loss} lr {record['learning_rate']:.2e}", refresh=False)
        shown = not self._has_bar and record["step"] % self._every_steps == 0
        _log.log(logging.INFO if shown else logging.DEBUG, "%s", self._step_line(record))

    def order(self, record: dict[str, Any]) -> None:
        """Keep the link of the order chain that a step ended with."""
        if self._files:
            self._files["order"].write(record)

    def scores(self, records: list[dict[str, Any]]) -> None:
        """Tell one evaluation of every held-out source."""
        if not self._files:
            return
        for record in records:
            self._files["scores"].write(record)
            self._scored.add((record["step"], record["source"]))
        told = "  ".join(f"{r['source']} {r['loss']:.4f}{_more_or_less(r)}" for r in records)
        seconds = sum(record.get("evaluation_seconds", 0.0) for record in records)
        _log.info("held out at step %d: %s (in %.1f s)", records[0]["step"], told, seconds)

    def close(self) -> None:
        """End the bar and close the files."""
        self._bar.close()
        for file in self._files.values():
            file.close()

    def _step_line(self, record: dict[str, Any]) -> str:
        by_source = " ".join(f"{name}={_number(loss, '.4f')}" for name, loss in record["loss_by_source"].items())
        # A speed of 0.0 is one below 0.05, rounded.
        left = (self._total_tokens - record["tokens"]) / max(record["tokens_per_second"], 0.05)
        told = "-" if record.get("skipped") else as_duration(left)
        return (
            f"step={record['step']} tokens={record['tokens']}/{self._total_tokens} stage={record['stage']} "
            f"loss={_number(record['loss'], '.4f')} {by_source} lr={record['learning_rate']:.3e} "
            f"norm={_number(record['grad_norm'], '.3f')} {'skipped ' if record.get('skipped') else ''}"
            f"tok/s={record['tokens_per_second']:.0f} mfu={record['mfu']:.1%} left={told}"
        )


def _number(value: float | None, digits: str) -> str:
    """`-` for what is none: a step that was skipped may have no loss."""
    return "-" if value is None else format(value, digits)


def _more_or_less(score: dict[str, Any]) -> str:
    """` ±0.0123`, the interval around a loss; nothing where it is not known."""
    return "" if score.get("interval") is None else f" ±{score['interval']:.4f}"
