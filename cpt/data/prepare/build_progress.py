"""How far a build is, told while it runs: a bar on a terminal, else a log line now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import final

from tqdm import tqdm

from cpt.data.prepare.counted import counted

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


@final
class BuildProgress:
    """Counts documents, tokens and bytes of text; a context manager. done: documents and bytes of an earlier run."""

    def __init__(self, name: str, is_shown: bool, done: tuple[int, int] = (0, 0)) -> None:
        self._is_shown = is_shown
        self._name = name
        self._documents, num_bytes = done
        self._bar = tqdm(
            desc=name, unit="B", unit_scale=True, initial=num_bytes, disable=not (is_shown and sys.stderr.isatty())
        )
        self._begin = self._last_line = time.monotonic()
        self._tokens = 0

    def advance(self, num_documents: int, num_tokens: int, num_bytes: int) -> None:
        """Counts on, and tells of it if it is time."""
        self._documents += num_documents
        self._tokens += num_tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._begin, 1e-9)
        self._bar.update(num_bytes)
        self._bar.set_postfix_str(f"{counted(self._documents, 'document')}, {rate:,.0f} tokens/s", refresh=False)
        if self._is_shown and self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            counts = f"{counted(self._documents, 'document')}, {counted(self._tokens, 'token')}"
            logger.info("%s: %s, %.0f tokens/s", self._name, counts, rate)

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.close()
