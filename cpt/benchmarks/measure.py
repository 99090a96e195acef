"""CPU time of several things in turn: what disturbs the machine then disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A repetition takes about so long: well above the clock's step, short enough for many turns.
_SECONDS_A_REPETITION = 0.1
_MOST_SAMPLES = 1 << 20


@dataclass(frozen=True)
class Reader:
    """Reads samples of a text in a shuffled order. `read(n)`: the next n or a few more; how many it read.

    `batch`: samples that it hands out at once, None where the library hands out one at a time.
    """

    name: str
    read: Callable[[int], int]
    batch: int | None = None


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repetitions."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values."""
        return cls(statistics.median(values), min(values), max(values))


def microseconds_a_sample(
    readers: Sequence[Reader],
    repetitions: int,
    advance: Callable[[], object] = lambda: None,
    seconds_a_repetition: float | None = None,
) -> list[list[float]]:
    """CPU time of all threads for a sample, of each reader in each of the alternating repetitions.

    `advance` is called after each measurement. `seconds_a_repetition`: about as long as one lasts, 0.1 unless told.
    The first reading of each reader is not counted, and what its threads do after a turn is not charged to the next.
    """
    aim = seconds_a_repetition or _SECONDS_A_REPETITION
    numbers = []
    for reader in readers:
        reader.read(1)
        number, seconds = 1, 0.0
        while seconds < aim / 4 and number < _MOST_SAMPLES:
            number *= 2
            seconds = _seconds(reader, number)[0]
        numbers.append(max(1, round(number * min(4.0, aim / max(seconds, 1e-9)))))
    taken: list[list[float]] = [[] for _ in readers]
    for _ in range(repetitions):
        for reader, number, values in zip(readers, numbers, taken, strict=True):
            _wait_for_quiet()
            seconds, read = _seconds(reader, number)
            values.append(seconds / read * 1e6)
            advance()
    return taken


def _wait_for_quiet() -> None:
    """Until no thread of this process works, or for a second."""
    for _ in range(100):
        began = time.process_time()
        time.sleep(0.01)
        if time.process_time() - began < 0.0005:
            break


def _seconds(reader: Reader, number: int) -> tuple[float, int]:
    began = time.process_time()
    read = reader.read(number)
    return time.process_time() - began, read
