"""When a run saves, and what stays."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.progress import Progress


@dataclass(frozen=True)
class Settings:
    """Saved at the end of every stage and when asked to stop, and every `every_tokens`; the newest `keep_last` stay.

    `keep_every_tokens`: saved, and kept for ever, at the first step at or past each multiple of it; `keep_at_tokens`:
    at or past each of these tokens of the run, such as where branches are to leave it.
    `temporary_every_minutes`: saved when so long after the last save; the newest one of these stays until another is
    saved. `in_background`: training waits for a copy in host memory only, and a save that fails does not end the run,
    but `most_failures` of them one after another do: what cannot be saved is not worth its hours.
    """

    every_tokens: int | None = None
    keep_last: int = 2
    keep_every_tokens: int | None = None
    keep_at_tokens: tuple[int, ...] = ()
    temporary_every_minutes: float | None = None
    in_background: bool = True
    most_failures: int = 10

    def faults(self) -> list[str]:
        """Counts below one, no time at all."""
        faults = [] if self.keep_last >= 1 else [f"keep_last = {self.keep_last}: at least 1"]
        if self.every_tokens is not None and self.every_tokens < 1:
            faults.append(f"every_tokens = {self.every_tokens}: at least 1; leave it out to save at stage ends only")
        if self.keep_every_tokens is not None and self.keep_every_tokens < 1:
            faults.append(f"keep_every_tokens = {self.keep_every_tokens}: at least 1; leave it out to keep none")
        faults += [f"keep_at_tokens: {tokens}: at least 1" for tokens in self.keep_at_tokens if tokens < 1]
        if self.temporary_every_minutes is not None and self.temporary_every_minutes <= 0:
            faults.append(
                f"temporary_every_minutes = {self.temporary_every_minutes}: above 0; leave it out to save by tokens"
            )
        if self.most_failures < 1:
            faults.append(f"most_failures = {self.most_failures}: at least 1, which ends the run at the first one")
        return faults

    def keeps_for_ever(self, progress: Progress) -> bool:
        """Whether a checkpoint at that place is one that stays for ever."""
        before = progress.tokens - progress.step_tokens
        is_named = any(before < tokens <= progress.tokens for tokens in self.keep_at_tokens)
        return is_named or progress.crosses(self.keep_every_tokens)
