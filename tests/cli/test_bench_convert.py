"""`cpt bench convert` converts for real, there and back to the same bytes, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest

from cpt import cli
from cpt.benchmarks import convert
from cpt.config import Fault


@pytest.mark.long
def test_the_table_tells_of_both_ways_and_nothing_is_left(tmp_path, capsys):
    words = ["--shape", "tiny", "--repetitions", "1", "--no-transformers", "--json", str(tmp_path / "x.json")]
    assert cli.main(["bench", "convert", *words, "--folder", str(tmp_path)]) == 0
    assert "| cpt from-hf | " in capsys.readouterr().out
    conversions = json.loads((tmp_path / "x.json").read_text())["conversions"]
    assert [one["name"] for one in conversions] == ["cpt from-hf", "cpt to-hf", "cpt to-hf with its certificate"]
    assert all(one["gb_per_second"]["median"] > 0 for one in conversions)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_cannot_be_measured_is_refused(capsys):
    assert cli.main(["bench", "convert", "--shape", "round", "--repetitions", "0"]) == 2
    told = capsys.readouterr().err
    assert (
        "shape = round: known: tiny, llama-1.1b, pythia-1.4b, llama-8b" in told
        and "repetitions = 0: at least 1" in told
    )


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(Fault, match=r"7 GB are needed, 0 GB are there"):
        convert.compare(convert.Settings("llama-1.1b", 1, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []
