"""`attempts.jsonl`: whole lines from many processes, and what a full disk tore is passed over."""

from __future__ import annotations

import multiprocessing

from cpt.observe.attempts import ATTEMPTS, last_end, note_attempt, note_end, note_end_before_start, read_attempts


def test_events_come_back_in_their_order(tmp_path):
    assert read_attempts(tmp_path) == []
    assert note_attempt(tmp_path, "started", ranks=2)
    assert note_attempt(tmp_path, "ended", how="failed", reason="a 'quoted' reason\nof two lines")
    first, second = read_attempts(tmp_path)
    assert first["event"] == "started" and first["ranks"] == 2 and first["time"] <= second["time"]
    assert second["reason"] == "a 'quoted' reason\nof two lines"


def test_a_torn_line_costs_no_other(tmp_path):
    note_attempt(tmp_path, "started")
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"event": "ended", "ti')
    note_attempt(tmp_path, "started")
    assert [event["event"] for event in read_attempts(tmp_path)] == ["started", "started"]


def test_a_folder_that_takes_nothing_is_told_and_raises_nothing(tmp_path):
    assert not note_attempt(tmp_path / "missing", "started")


def _note_many(folder, number):
    for index in range(100):
        note_attempt(folder, "training", process=number, index=index)


def test_many_processes_tear_no_line(tmp_path):
    processes = [multiprocessing.Process(target=_note_many, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = {(event["process"], event["index"]) for event in read_attempts(tmp_path)}
    assert found == {(number, index) for number in range(4) for index in range(100)}


def _note_end(folder, number):
    note_end(folder, how="failed", rank=number)


def test_ranks_that_find_together_that_it_is_over_tell_it_once(tmp_path):
    note_attempt(tmp_path, "started")
    processes = [multiprocessing.Process(target=_note_end, args=(tmp_path, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [event["event"] for event in read_attempts(tmp_path)] == ["started", "ended"]
    note_attempt(tmp_path, "restarting")
    note_attempt(tmp_path, "started")
    assert note_end(tmp_path, how="finished")
    assert not note_end(tmp_path, how="failed")


def test_what_never_started_does_not_end(tmp_path):
    assert not note_end(tmp_path, how="failed")
    assert read_attempts(tmp_path) == []


def test_an_attempt_that_could_not_start_is_noted_once_with_its_reason(tmp_path):
    note_attempt(tmp_path, "launched")
    assert note_end_before_start(tmp_path, "ranks did not come", rank=0)
    assert not note_end_before_start(tmp_path, "ranks did not come", rank=1)
    ended = last_end(read_attempts(tmp_path))
    assert (ended["how"], ended["reason"], ended["rank"]) == ("failed", "ranks did not come", 0)
    assert ended["is_final"] is False and ended["has_started"] is False


def test_an_attempt_that_could_not_start_does_not_end_one_that_goes_on(tmp_path):
    note_attempt(tmp_path, "started")
    assert note_end_before_start(tmp_path, "another process is training there")
    assert last_end(read_attempts(tmp_path)) is None
    assert note_end(tmp_path, how="finished")
    assert last_end(read_attempts(tmp_path))["how"] == "finished"
