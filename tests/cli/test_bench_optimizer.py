"""`cpt bench optimizer` measures each way to update for real, at a small size."""

from __future__ import annotations

import json

import pytest
import torch

from cpt import cli
from cpt.benchmarks.optimizer import _Shard


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("cpt.benchmarks.measure._SECONDS_A_REPETITION", 0.001)


def test_every_way_to_update_is_measured_and_the_first_is_the_yardstick(tmp_path, capsys):
    words = ["--parameters", "1001", "--repetitions", "2", "--json", str(tmp_path / "x.json")]
    assert cli.main(["bench", "optimizer", *words]) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["settings"] == {"parameters": 1001, "repetitions": 2}
    first, *others = told["updates"]
    assert first["times_as_fast"] == {"median": 1.0, "smallest": 1.0, "largest": 1.0}
    assert len(others) == 3 and all(one["nanoseconds_a_parameter"]["median"] > 0 for one in others)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1,001 parameters in fp32") and len(lines) == 8


def test_ways_with_the_same_passes_come_to_the_same_weights():
    shards = [_Shard(1001, is_fused, is_alone=False) for is_fused in (False, True)]
    for shard in shards:
        shard.update(3)
    assert (shards[0].master - shards[1].master).abs().max() < 1e-6
    assert torch.equal(shards[1].weight, shards[1].master.bfloat16())


def test_nothing_to_measure_is_refused(capsys):
    assert cli.main(["bench", "optimizer", "--parameters", "0", "--repetitions", "0"]) == 2
    told = capsys.readouterr().err
    assert "parameters = 0: at least 1" in told and "repetitions = 0: at least 1" in told
