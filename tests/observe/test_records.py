"""Lines written are there at once, a torn one is passed over, and later ones are dropped on going on."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cpt.observe.records import Records, read_records


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    records = Records(tmp_path / "metrics.jsonl", 0)
    records.write({"step": 1, "source": "français"})
    assert list(read_records(tmp_path / "metrics.jsonl")) == [{"step": 1, "source": "français"}]
    records.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text(
        encoding="utf-8"
    ) == '{"step": 1, "source": "français"}\n{"step": 2}\n'
    records.close()


@pytest.mark.parametrize(("keep_until_step", "kept"), [(0, []), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])])
def test_lines_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path, keep_until_step, kept):
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 2, 3)))
    records = Records(path, keep_until_step)
    assert [record["step"] for record in records.kept] == kept
    records.write({"step": 10})
    assert [record["step"] for record in read_records(path)] == [*kept, 10]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_torn_anywhere_even_within_a_character_is_passed_over(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    torn = json.dumps({"step": 2, "source": "日本語日本語"}, ensure_ascii=False).encode()[:cut]
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert list(read_records(path)) == [{"step": 1}]
    records = Records(path, 5)
    records.write({"step": 2})
    assert list(read_records(path)) == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_before_the_last_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="Invalid control character"):
        list(read_records(tmp_path / "metrics.jsonl"))


def test_numbers_survive_exactly(tmp_path):
    record = {"step": 1, "loss": 0.1 + 0.2, "rate": 3e-05, "none": None}
    Records(tmp_path / "m.jsonl", 0).write(record)
    assert list(read_records(tmp_path / "m.jsonl")) == [record]


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """As on a full disk: a write stops there, in the midst of a line, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_that_the_disk_does_not_take_are_told_once_and_written_when_it_does(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    records = Records(path, 0)
    with caplog.at_level(logging.INFO, "cpt"):
        records.write({"step": 1})
        with no_file_beyond(17):
            records.write({"step": 2})
            records.write({"step": 3})
            assert path.read_text() == '{"step": 1}\n{"ste' and list(read_records(path)) == [{"step": 1}]
            with pytest.raises(OSError, match="File too large") as raised:
                records.settle()
            assert raised.value.filename == str(path)
        records.write({"step": 4})
        records.settle()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4]
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(f"{path}: File too large; its lines are kept in memory")
    assert caplog.messages[1] == f"{path}: all lines are written again"


def test_lines_that_the_disk_never_takes_are_told_at_the_end(tmp_path, caplog):
    records = Records(tmp_path / "metrics.jsonl", 0)
    with no_file_beyond(5):
        records.write({"step": 1})
        records.close()
    assert caplog.messages[-1].endswith("its last lines are lost; the run makes those steps again")


def test_a_file_that_was_deleted_is_there_again_with_every_line_when_lines_must_be_kept(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n')
    records = Records(path, 5)
    records.write({"step": 2})
    shutil.rmtree(path.parent)
    records.write({"step": 3})
    records.keep()
    records.write({"step": 4})
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]
