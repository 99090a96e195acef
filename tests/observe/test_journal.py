"""What a run tells: one line that grep can read a step, records in files, nothing on other ranks."""

from __future__ import annotations

import io
import logging
import resource

from cpt.observe.attempts import read_attempts
from cpt.observe.journal import Journal
from cpt.observe.logs import log_to_file, log_to_terminal
from cpt.observe.records import read_records

STEP = {"step": 3, "tokens": 300, "stage": "prose", "loss": 2.5, "loss_by_source": {"prose": 2.25, "replay/code": 3.0},
        "learning_rate": 3e-4, "grad_norm": 1.5, "tokens_per_second": 50.0, "mfu": 0.315}  # fmt: skip
SCORES = [
    {"step": 3, "source": "prose", "loss": 2.0, "interval": 0.0123, "evaluation_seconds": 1.5},
    {"step": 3, "source": "code", "loss": 4.0, "interval": None, "evaluation_seconds": 0.75},
]
TOLD = "held out at step 3: prose 2.0000 ±0.0123  code 4.0000 (in 2.2 s)"


def journal_in(folder, is_first=True, keep_until_step=0, every_steps=1) -> Journal:
    return Journal(folder, is_first, keep_until_step, total_tokens=1000, tokens_done=0, every_steps=every_steps)


def test_a_step_is_one_line_that_says_all(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "cpt"):
        journal_in(tmp_path).step(STEP, 100)
    assert caplog.messages == [
        "step=3 tokens=300/1000 stage=prose loss=2.5000 prose=2.2500 replay/code=3.0000 lr=3.000e-04 norm=1.500 "
        "tok/s=50 mfu=31.5% left=14s"
    ]
    assert list(read_records(tmp_path / "metrics.jsonl")) == [STEP]


def test_a_very_slow_step_is_told_too(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "cpt"):
        journal_in(tmp_path).step({**STEP, "tokens_per_second": 0.0}, 100)
    assert caplog.messages[0].endswith("tok/s=0 mfu=31.5% left=3h53m")


def test_only_some_lines_are_shown_and_all_are_recorded(tmp_path, caplog):
    journal = journal_in(tmp_path, every_steps=4)
    with caplog.at_level(logging.INFO, "cpt"):
        for step in range(1, 10):
            journal.step({**STEP, "step": step}, 100)
    assert [message.split()[0] for message in caplog.messages] == ["step=4", "step=8"]
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 9


def test_an_evaluation_is_one_line_and_a_record_a_source(tmp_path, caplog):
    journal = journal_in(tmp_path)
    with caplog.at_level(logging.INFO, "cpt"):
        journal.scores(SCORES)
    assert caplog.messages == [TOLD]
    assert list(read_records(tmp_path / "scores.jsonl")) == SCORES
    assert journal.has_scored(3, "code") and not journal.has_scored(2, "code") and not journal.has_scored(3, "law")


def test_going_on_keeps_what_was_before_and_knows_what_was_scored(tmp_path):
    before = journal_in(tmp_path)
    for step in (1, 2, 3):
        before.step({**STEP, "step": step}, 100)
        before.order({"step": step, "chain": "0"})
        before.scores([{**SCORES[0], "step": step}])
    before.close()
    after = journal_in(tmp_path, keep_until_step=2)
    assert [after.has_scored(step, "prose") for step in (1, 2, 3)] == [True, True, False]
    for name in ("metrics", "scores", "order"):
        assert [record["step"] for record in read_records(tmp_path / f"{name}.jsonl")] == [1, 2]


def test_work_that_is_dropped_on_going_on_is_noted_with_its_seconds(tmp_path):
    before = journal_in(tmp_path)
    for step in (1, 2, 3, 4):
        before.step({**STEP, "step": step, "step_seconds": 2.0, **({"save_seconds": 0.5} if step == 3 else {})}, 100)
    before.scores([{**record, "step": 4} for record in SCORES])
    before.close()
    assert read_attempts(tmp_path) == []
    journal_in(tmp_path, keep_until_step=2).close()
    (event,) = read_attempts(tmp_path)
    # Two steps of 2 s, a save of 0.5 s between them, evaluations of 1.5 and 0.75 s.
    assert (event["event"], event["steps"], event["seconds"]) == ("resumed_over", 2, 6.75)
    journal_in(tmp_path, keep_until_step=2).close()
    assert len(read_attempts(tmp_path)) == 1


def test_going_back_drops_lines_and_scores_and_says_what_they_took(tmp_path):
    journal = journal_in(tmp_path)
    for step in (1, 2, 3):
        journal.step({**STEP, "step": step, "step_seconds": 2.0}, 100)
        journal.order({"step": step, "chain": "0"})
        journal.scores([{**SCORES[0], "step": step, "evaluation_seconds": 0.25}])
    assert journal.rewind(1, 100) == 4.5
    journal.step({**STEP, "step": 2}, 100)
    journal.close()
    assert [journal.has_scored(step, "prose") for step in (1, 2, 3)] == [True, False, False]
    names = ("metrics", "scores", "order")
    found = {name: [line["step"] for line in read_records(tmp_path / f"{name}.jsonl")] for name in names}
    assert found == {"metrics": [1, 2], "scores": [1], "order": [1]}


def test_a_step_that_was_skipped_is_told_without_numbers_that_it_has_not(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "cpt"):
        skipped = {"loss": None, "grad_norm": None, "loss_by_source": {"prose": None}, "skipped": 1}
        journal_in(tmp_path).step({**STEP, **skipped, "tokens_per_second": 0.0}, 100)
    assert "loss=- prose=- " in caplog.messages[0] and "norm=- skipped tok/s=0 " in caplog.messages[0]
    assert caplog.messages[0].endswith("left=-")


def test_other_ranks_write_and_tell_nothing(tmp_path, caplog):
    journal = journal_in(tmp_path, is_first=False)
    with caplog.at_level(logging.DEBUG, "cpt"):
        journal.step(STEP, 100)
        journal.scores(SCORES)
        journal.order({"step": 1})
        journal.close()
    assert not journal.has_scored(3, "prose")
    assert caplog.messages == []
    assert list(tmp_path.iterdir()) == []


def test_the_log_file_holds_the_step_lines_that_the_terminal_does_not_show(tmp_path, capsys):
    log_to_terminal()
    log_to_file(tmp_path, 0)
    journal = journal_in(tmp_path, every_steps=2)
    for step in (1, 2, 3):
        journal.step({**STEP, "step": step}, 100)
    shown = capsys.readouterr().err.splitlines()
    kept = (tmp_path / "logs/rank-00000.log").read_text().splitlines()
    assert [line.split("step=")[1][0] for line in shown] == ["2"]
    assert [line.split("step=")[1][0] for line in kept] == ["1", "2", "3"]


def test_the_first_rank_tells_the_story_and_the_others_only_warn(tmp_path, capsys):
    log_to_terminal(0)
    logging.getLogger("cpt.x").info("told")
    logging.getLogger("cpt.x").debug("not told")
    log_to_terminal(3)
    logging.getLogger("cpt.x").info("not told either")
    logging.getLogger("cpt.x").warning("beware")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(" I told")
    assert second.startswith("[rank 3] ")
    assert second.endswith(" W beware")


def test_a_line_beside_a_progress_bar_stands_on_a_line_of_its_own(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    log_to_terminal()
    journal = journal_in(tmp_path)
    journal.step(STEP, 100)
    journal.scores(SCORES)
    journal.close()
    shown = terminal.getvalue()
    assert "step=3" not in shown  # the bar tells it
    before, _, after = shown.partition(f"{TOLD}\n")
    clock = " I "
    assert before.removesuffix(clock)[:-8].endswith("\r")
    assert after.startswith("\r")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_terminal_that_has_gone_does_not_end_the_run(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    log_to_terminal()
    log_to_file(tmp_path, 0)
    logging.getLogger("cpt.x").warning("still told")
    assert "still told" in (tmp_path / "logs/rank-00000.log").read_text()


def test_every_rank_keeps_a_file_of_its_own_and_adds_to_it(tmp_path):
    for told in ("once", "again"):
        log_to_terminal(12)
        log_to_file(tmp_path, 12)
        logging.getLogger("cpt.x").info(told)
    lines = (tmp_path / "logs/rank-00012.log").read_text().splitlines()
    assert [line.rsplit(" ", 3)[1:] for line in lines] == [["INFO", "cpt.x", "once"], ["INFO", "cpt.x", "again"]]


def test_a_second_run_of_one_process_leaves_the_log_of_the_first_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        log_to_file(tmp_path / name, 0)
        logging.getLogger("cpt.x").warning("in %s", name)
    for name in ("one", "two"):
        (line,) = (tmp_path / name / "logs/rank-00000.log").read_text().splitlines()
        assert line.endswith(f"in {name}")


def test_warnings_of_libraries_are_kept_in_the_file(tmp_path, capsys):
    log_to_terminal()
    log_to_file(tmp_path, 0)
    logging.getLogger("py.warnings").warning("a library warns")
    assert "a library warns" in (tmp_path / "logs/rank-00000.log").read_text()


def test_a_log_file_on_a_full_disk_says_nothing_and_has_all_lines_later(tmp_path, capsys):
    log_to_file(tmp_path, 0)
    told, before = logging.getLogger("cpt.x"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        told.warning("one")
        told.warning("two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told.warning("three")
    lines = (tmp_path / "logs/rank-00000.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two", "three"]
    assert "Logging error" not in capsys.readouterr().err
