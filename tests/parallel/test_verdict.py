"""What signs of life mean: pure functions of what was heard from whom, how long ago."""

from __future__ import annotations

from dataclasses import replace

from cpt.parallel.verdict import (
    BROKEN,
    COMPUTING,
    FAILED,
    FIRST_EVALUATION,
    FIRST_LOADING,
    FIRST_STEP,
    HUNG,
    LOADING,
    LOST,
    SAVING,
    Limits,
    Sign,
    judge,
    told_ranks,
)
from cpt.parallel.watch import Settings, Watch, is_of_a_connection

LIMITS = Limits(hang=900, slow=3600, lost=60, evidence=8, beat=2)
WELL = [Sign(f"n{rank // 2}", count=50, phase=COMPUTING, step=7, seconds=1.0) for rank in range(4)]


def but(rank: int, **changes) -> list[Sign]:
    """All are well but one."""
    return [replace(sign, **changes) if number == rank else sign for number, sign in enumerate(WELL)]


def quiet(**of_ranks: float) -> list[float]:
    return [of_ranks.get(f"rank{rank}", 1.0) for rank in range(4)]


def all_for(seconds: float, **changes) -> list[Sign]:
    return [replace(sign, seconds=seconds, **changes) for sign in WELL]


def test_nothing_is_said_as_long_as_somebody_gets_further():
    assert judge(WELL, quiet(), LIMITS) is None
    assert judge([*all_for(5000)[:3], WELL[3]], quiet(), LIMITS) is None


def test_one_that_gives_no_sign_is_lost_after_the_stated_time_and_not_before():
    assert judge(WELL, quiet(rank2=59), LIMITS) is None
    found = judge(WELL, quiet(rank2=61), LIMITS)
    assert (found.kind, found.rank, found.node, found.step) == (LOST, 2, "n1", 7)
    assert found.reason.startswith("rank 2 on n1 is gone: no sign of life for 61 s (watch.lost_seconds = 60: ")
    assert found.reason.endswith("last seen computing for step 7")


def test_all_ranks_of_a_machine_that_failed_are_named_together():
    found = judge(WELL, quiet(rank2=61, rank3=59.5), LIMITS)
    assert found.reason.startswith("ranks 2, 3 on n1 are gone: ")


def test_where_a_connection_broke_it_does_not_take_long_to_find_who_is_gone():
    assert judge(but(0, broken="reset by peer"), quiet(rank3=7), LIMITS) is None
    found = judge(but(0, broken="reset by peer"), quiet(rank3=9), LIMITS)
    assert (found.kind, found.rank) == (LOST, 3) and "connections to it broke" in found.reason


def test_a_connection_that_broke_though_all_are_there_is_told_as_such():
    found = judge(but(1, broken="RuntimeError: timed out", seconds=13), quiet(), LIMITS)
    assert found.kind == BROKEN
    assert "though all of them are there (rank 1 on n0: RuntimeError: timed out)" in found.reason


def test_it_is_the_one_behind_the_others_that_they_wait_for():
    signs = [replace(sign, seconds=901) for sign in but(1, count=49, phase=LOADING)]
    found = judge(signs, quiet(), LIMITS)
    assert (found.kind, found.rank, found.node) == (HUNG, 1, "n0")
    assert found.reason == (
        "none of 4 ranks has got any further for 902 s (watch.hang_seconds = 900): rank 1 on n0 is behind, loading "
        "data for step 7; the others wait, computing for step 7"
    )


def test_what_is_done_for_the_first_time_may_take_longer():
    for phase in (FIRST_LOADING, FIRST_STEP, FIRST_EVALUATION):
        assert judge(all_for(1000, phase=phase), quiet(), LIMITS) is None
        assert "watch.slow_seconds" in judge(all_for(3700, phase=phase), quiet(), LIMITS).reason


def test_what_comes_to_no_other_place_but_goes_on_is_alive_and_stays_where_it_was_counted():
    watch = Watch()
    watch.alive(COMPUTING, 3)
    watch._place = (*watch._place[:3], watch._place[3] - 1000)
    before = watch._sign_now()
    watch.still_alive()
    after = watch._sign_now()
    assert (after.count, after.place) == (before.count, before.place) and after.seconds < 1 < before.seconds


def test_where_all_are_at_the_same_place_nobody_is_blamed():
    found = judge(all_for(901), quiet(), LIMITS)
    assert (found.kind, found.rank) == (HUNG, None)
    assert "all are at the same place, computing for step 7" in found.reason


def test_what_is_slow_by_nature_has_more_time():
    for phase in (SAVING, FIRST_STEP):
        signs = [replace(sign, seconds=3000) for sign in but(1, count=49, phase=phase)]
        assert judge(signs, quiet(), LIMITS) is None
        signs = [replace(sign, seconds=3601) for sign in signs]
        assert "(watch.slow_seconds = 3600)" in judge(signs, quiet(), LIMITS).reason


def test_a_failure_that_is_told_counts_before_what_follows_from_it():
    signs = but(3, failed="ValueError: wrong")
    signs[0] = replace(signs[0], broken="reset by peer")
    found = judge(signs, quiet(rank2=100), LIMITS)
    assert (found.kind, found.rank, found.reason) == (FAILED, 3, "rank 3 on n1 failed: ValueError: wrong")


def test_one_that_has_ended_is_not_missed_but_waiting_for_it_is_told():
    signs = but(2, is_closed=True)
    assert judge(signs, quiet(rank2=1000), LIMITS) is None
    signs = [replace(sign, seconds=901) for sign in signs]
    assert "they wait for rank 2 on n1, which ended before" in judge(signs, quiet(rank2=1000), LIMITS).reason


def test_a_process_by_itself_has_nobody_behind_it():
    found = judge([Sign("n0", phase=LOADING, step=3, seconds=901)], [0.0], LIMITS)
    assert found.reason == ("nothing has got any further for 901 s (watch.hang_seconds = 900): loading data for step 3")


def test_of_many_ranks_the_first_are_told():
    signs = [Sign("n0")] * 20
    assert told_ranks(signs, range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 on n0 and 12 more"
    assert told_ranks(WELL, [1, 2, 3]) == "ranks 1 on n0 and 2, 3 on n1"


def test_settings_that_leave_no_time_are_refused():
    assert Settings().faults() == []
    assert Settings(hang_seconds=None).faults() == []
    assert Settings(lost_seconds=0.5).faults() == ["lost_seconds = 0.5: at least 1 second"]
    (fault,) = Settings(hang_seconds=100, slow_seconds=50).faults()
    assert fault.startswith("slow_seconds = 50: at least hang_seconds = 100")


def test_an_error_of_a_collective_is_told_from_others():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    assert is_of_a_connection(RuntimeError(gloo))
    assert not is_of_a_connection(RuntimeError("shapes differ"))
    assert not is_of_a_connection(ValueError("NCCL is a word"))
