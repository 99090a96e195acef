"""What a user can mend: told in one line each, all at once, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Fault(ValueError):
    """One or more mistakes in a request: bad settings, unreadable files, a used folder.

    Each line says what is wrong, the value, where it was set, and what would do. The command line prints the lines
    and ends with status 2. Anything else that is raised is our own error and keeps its traceback.

    `is_passing`: the same request may work later, or on another machine (a disk that is not mounted on this one, ranks
    that did not come in time): status 1, so that a supervisor tries again.
    """

    is_passing: bool = False

    def __init__(self, lines: str | Iterable[str], *, is_passing: bool = False) -> None:
        self.lines: tuple[str, ...] = (lines,) if isinstance(lines, str) else tuple(lines)
        self.is_passing = is_passing
        super().__init__("\n".join(self.lines))


def nearest(name: str, known: Iterable[str]) -> str:
    """An ending for a message about an unknown name: the names that look most like it, or all of them if few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known)
