"""A stretch of a stage, told as a share of it (`1%`, `0.01`) or in tokens (`20M`)."""

from __future__ import annotations

from fractions import Fraction


class Length:
    """`Length(tokens=20_000_000)` or `Length(share=Fraction(1, 100))`; none at all is `Length()`."""

    def __init__(self, tokens: int = 0, share: Fraction | None = None) -> None:
        self._tokens, self._share = tokens, share

    def tokens_of(self, stage_tokens: int) -> float:
        """How many tokens it is of a stage of so many; not rounded."""
        return float(self._tokens if self._share is None else self._share * stage_tokens)

    @property
    def plain(self) -> int | float | str:
        """As a config holds it; reads back to an equal one."""
        if self._share is None:
            return self._tokens
        exact = float(self._share)
        is_decimal = Fraction(str(exact)) == self._share
        return exact if is_decimal and abs(self._share) < 1 else f"{self._share * 100}%"

    @property
    def faults(self) -> list[str]:
        """Less than nothing, more than all; the name of the setting goes before."""
        if self._tokens < 0 or (self._share or 0) < 0:
            return [f"{self.plain}: at least 0"]
        return [f"{self.plain}: a share of the stage, at most 100%"] if (self._share or 0) > 1 else []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Length) and (self._tokens, self._share) == (other._tokens, other._share)

    def __hash__(self) -> int:
        return hash((self._tokens, self._share))

    def __repr__(self) -> str:
        return f"Length({self.plain})"


def faults_of_lengths(**lengths: Length) -> list[str]:
    """One line for each setting of that name that is no stretch of a stage."""
    return [f"{name} = {fault}" for name, length in lengths.items() for fault in length.faults]
