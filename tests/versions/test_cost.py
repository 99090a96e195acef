"""What releases cost in tokens, held against the figures of the paper and sums by hand."""

from __future__ import annotations

import pytest

from cpt.versions.cost import Cost
from cpt.versions.telling import cost_lines


def percent(number: int, tenths: int) -> int:
    cost = Cost([1000] * number, [100 * tenths] * number)
    return round(100 * cost.path_and_branches / cost.from_scratch)


@pytest.mark.parametrize(("number", "told"), [(2, 87), (3, 70), (4, 58), (5, 49), (6, 43), (7, 38), (8, 34)])
def test_of_scratch_for_n_equal_versions_and_six_tenths(number, told):
    assert percent(number, 6) == told


@pytest.mark.parametrize(("tenths", "told"), [(2, 46), (4, 52), (6, 58), (8, 64), (10, 70)])
def test_of_scratch_for_four_versions_and_any_share(tenths, told):
    assert percent(4, tenths) == told


def test_versions_of_unequal_length_worked_by_hand():
    cost = Cost([100, 300, 50], [60, 180, 30])
    assert cost.path == 100 + 300 + 20
    assert cost.path_and_branches == 420 + 60 + 180 + 30
    assert cost.from_scratch == 100 + 400 + 450
    assert cost.plainly_on == 450


def test_a_single_release_costs_what_it_costs_from_scratch():
    cost = Cost([100], [60])
    assert cost.path_and_branches == cost.from_scratch == cost.plainly_on == 100


def test_the_table_tells_58_percent():
    assert cost_lines(Cost([10_000] * 4, [6_000] * 4)) == [
        "cost of 4 releases              tokens  of scratch  of plainly on",
        "main path and branches          58,000         58%           145%",
        "each version from scratch      100,000        100%           250%",
        "plainly on, one after another   40,000         40%           100%",
    ]
