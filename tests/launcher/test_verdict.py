"""What an attempt came to is read from what the run wrote, and how often in a row it came to nothing is counted."""

from __future__ import annotations

import signal

import pytest

from cpt_launcher.verdict import Limits, Tries, tries_without_progress, verdict_of


def ended(how: str, **more: object) -> dict[str, object]:
    return {"event": "ended", "time": 1.0, "how": how, **more}


def test_a_run_with_its_marker_is_finished_whatever_the_launcher_says():
    assert verdict_of(143, signal.SIGTERM, True, []).end == "finished"


def test_an_exit_status_of_zero_without_the_marker_is_a_failure():
    verdict = verdict_of(0, None, False, [])
    assert (verdict.end, verdict.reason) == ("failed", "ended with status 0, without finishing")


def test_a_request_that_cannot_work_is_refused():
    assert verdict_of(2, None, False, []).end == "refused"


def test_a_request_of_which_the_run_says_that_it_may_pass_is_not_refused():
    told = ended("failed", reason="ranks 2 and 3 did not come", is_final=False, has_started=False)
    verdict = verdict_of(2, None, False, [told])
    assert (verdict.end, verdict.reason) == ("failed", "ranks 2 and 3 did not come")


def test_what_another_attempt_says_that_could_not_start_is_not_the_word_of_the_one_that_did():
    refused = ended("failed", reason="another process is training there", is_final=False, has_started=False)
    verdict = verdict_of(137, None, False, [{"event": "started", "time": 1.0}, refused])
    assert verdict.reason == "ended by signal 9 without a word"


def test_a_final_end_is_told_by_the_run_though_srun_hides_its_status():
    verdict = verdict_of(143, None, False, [ended("failed", reason="loss is not finite", is_final=True)])
    assert (verdict.end, verdict.reason) == ("final", "loss is not finite")


def test_a_signal_to_the_supervisor_stops_the_run_whatever_status_it_left():
    verdict = verdict_of(1, signal.SIGUSR1, False, [ended("failed", reason="peer closed")])
    assert (verdict.end, verdict.signal) == ("stopped", signal.SIGUSR1)


def test_ranks_that_were_asked_to_stop_themselves_are_no_failure():
    verdict = verdict_of(143, None, False, [ended("stopped", signal=15, step=7)])
    assert (verdict.end, verdict.signal) == ("stopped", 15)


def test_a_failure_names_the_rank_and_the_node_that_the_run_names():
    verdict = verdict_of(1, None, False, [ended("failed", reason="no sign of life", rank=3, node="n2")])
    assert (verdict.end, verdict.reason) == ("failed", "no sign of life (rank 3 node n2)")


def test_what_the_reason_says_already_is_not_said_twice():
    verdict = verdict_of(1, None, False, [ended("failed", reason="rank 3 on n2 is gone", rank=3, node="n2")])
    assert verdict.reason == "rank 3 on n2 is gone"


def test_only_the_last_word_of_the_run_counts():
    verdict = verdict_of(1, None, False, [ended("stopped", signal=15), ended("failed", reason="disk full")])
    assert (verdict.end, verdict.reason) == ("failed", "disk full")


def test_a_death_by_signal_without_a_word_is_named():
    assert verdict_of(137, None, False, []).reason == "ended by signal 9 without a word"


def test_ranks_that_were_asked_by_the_file_are_told_so():
    verdict = verdict_of(143, None, False, [ended("stopped", signal=15, by="file")])
    assert (verdict.end, verdict.is_by_file) == ("stopped", True)
    assert verdict.reason == "its ranks were asked to stop by the file stop"


@pytest.mark.parametrize(
    ("status", "is_in_job", "events", "end"),
    [
        (143, True, [], "stopped"),
        (138, True, [], "stopped"),
        (143, False, [], "failed"),  # nobody takes the nodes away where no job is
        (137, True, [], "failed"),
        (143, True, [{"event": "started", "time": 1.0}], "failed"),  # it would have saved, and said so
        (143, True, [ended("failed", reason="no ranks")], "failed"),
    ],
)
def test_ranks_whose_nodes_are_taken_before_they_start_are_no_failure(status, is_in_job, events, end):
    assert verdict_of(status, None, False, events, is_in_job).end == end


def launched(step: int, by: str = "job 7") -> dict[str, object]:
    return {"event": "launched", "time": 1.0, "step": step, "by": by}


FAILED, STOPPED = ended("failed"), ended("stopped")


@pytest.mark.parametrize(
    ("events", "step", "expected"),
    [
        ([launched(0), FAILED], 0, Tries(1, 1)),
        ([launched(0), FAILED, launched(0), FAILED], 0, Tries(2, 2)),
        ([launched(0), FAILED, launched(0), FAILED], 10, Tries(0, 0)),  # a checkpoint was saved since
        ([launched(0), FAILED, launched(10), FAILED], 10, Tries(1, 1)),
        ([launched(0), launched(0), FAILED], 0, Tries(2, 2)),  # the first one's machine died
        ([launched(0), STOPPED, launched(0), FAILED], 0, Tries(1, 2)),
        ([launched(0), {"event": "requeued", "time": 1.0, "asked": 10}, launched(0), FAILED], 0, Tries(1, 2)),
        ([launched(0), {"event": "requeued", "time": 1.0, "failures": 1}, launched(0), FAILED], 0, Tries(2, 2)),
        ([launched(0, "job 6"), FAILED, launched(0), FAILED], 0, Tries(1, 1)),  # another supervision's
    ],
)
def test_tries_are_counted_since_the_newest_checkpoint(events, step, expected):
    assert tries_without_progress(events, "job 7", step) == expected


def test_pauses_double_up_to_the_longest():
    limits = Limits(backoff=10.0)
    assert [limits.pause_after(n) for n in (1, 2, 3, 6, 7, 5000)] == [10, 20, 40, 320, 600, 600]
