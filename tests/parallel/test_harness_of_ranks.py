"""What the harness says of ranks that raise, die or hang: a test that hung must say so."""

from __future__ import annotations

import os
import time

import pytest
from cpt_harness.ranks import RankError, in_processes


def fail() -> None:
    raise ValueError("this one")


@pytest.mark.parametrize(
    ("works", "told"),
    [
        ([lambda: 1, fail], "ValueError: this one"),
        ([lambda: 1, lambda: os._exit(7)], "a process died"),
        ([lambda: time.sleep(60), lambda: 1], "not in time"),
        ([lambda: time.sleep(60), lambda: time.sleep(60)], "not in time"),
    ],
    ids=["one raises", "one dies", "one hangs", "all hang"],
)
def test_the_first_trouble_is_told(works, told):
    with pytest.raises(RankError, match=told):
        in_processes(works, seconds=2.0)


def test_results_come_in_the_order_of_ranks():
    assert in_processes([lambda number=number: number for number in range(3)]) == [0, 1, 2]
