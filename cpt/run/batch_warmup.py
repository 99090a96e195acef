"""A batch that grows over the first tokens of a stage: small batches while the loss falls fast, large ones later."""

from __future__ import annotations

from dataclasses import dataclass

from cpt.config import Length, faults_of_lengths


@dataclass(frozen=True)
class BatchWarmup:
    """`windows` of the stage's first steps; over `tokens` (or a share of the stage) they grow to `batch.windows`, by
    `increment` at a time (left out: by `windows`), in equal stretches of tokens.

    A pure function of the stage's tokens, as schedules are. Source: Smith et al. 2018, arXiv:1711.00489 (larger batches
    in the place of lower rates); Brown et al. 2020, arXiv:2005.14165 (GPT-3's warm-up of the batch).
    """

    windows: int
    tokens: Length
    increment: int | None = None

    def faults(self) -> list[str]:
        """Counts below one, a stretch that is none."""
        counts = {"windows": self.windows, "increment": self.increment}
        faults = [f"{name} = {count}: at least 1" for name, count in counts.items() if count is not None and count < 1]
        return faults + faults_of_lengths(tokens=self.tokens)

    def faults_with(self, windows: int, micro_batch: int | None, stage_tokens: int) -> list[str]:
        """Why it cannot end at a batch of so many windows in a stage of so many tokens."""
        step, faults = self.increment or self.windows, []
        if self.windows > windows or (windows - self.windows) % step:
            fitting = [n for n in range(1, windows - self.windows + 1) if (windows - self.windows) % n == 0]
            faults.append(
                f"windows = {self.windows}: it cannot grow by {step} at a time to batch.windows = {windows}; "
                + (f"set increment to one of {', '.join(map(str, fitting[-8:]))}" if fitting else "begin with fewer")
            )
        if micro_batch is None:
            faults.append("windows: batch.micro_batch must be told, because the windows of a step change")
        if self.tokens.tokens_of(stage_tokens) > stage_tokens:
            faults.append(f"tokens = {self.tokens.plain}: the stage has {stage_tokens:,}")
        return faults

    def windows_at(self, tokens: int, windows: int, stage_tokens: int) -> int:
        """Windows of the step after so many tokens of the stage, which ends at a batch of `windows`."""
        number, length = self._plateaus(windows, stage_tokens)
        num_behind = number if tokens >= length else tokens * number // length
        return self.windows + num_behind * (self.increment or self.windows)

    def ends(self, windows: int, stage_tokens: int) -> list[int]:
        """The tokens at which the batch grows."""
        number, length = self._plateaus(windows, stage_tokens)
        return [-(-(index + 1) * length // number) for index in range(number)]

    def _plateaus(self, windows: int, stage_tokens: int) -> tuple[int, int]:
        """How many stretches there are before the whole batch, and how many tokens they take together."""
        return (windows - self.windows) // (self.increment or self.windows), round(self.tokens.tokens_of(stage_tokens))
