"""`cpt bench checkpoint` saves for real in every way, reads back, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
from cpt_harness.ranks import in_processes

from cpt import cli
from cpt.benchmarks import checkpoint
from cpt.config import Fault


@pytest.mark.long
def test_every_way_is_measured_and_nothing_is_left(tmp_path):
    words = ["--gigabytes", "0.001", "--repetitions", "1", "--length", "8", "--json", str(tmp_path / "x.json")]

    def measured() -> int:  # in a process of its own, because it meets itself over gloo
        return cli.main(["bench", "checkpoint", *words, "--folder", str(tmp_path)])

    assert in_processes([measured]) == [0]
    told = json.loads((tmp_path / "x.json").read_text())
    names = [one["name"] for one in told["writes"]]
    assert names[0].startswith("dd ") and [name.split(",")[0] for name in names[1:3]] == ["ours", "ours"]
    assert {"torch.distributed.checkpoint save", "DeepSpeed save_checkpoint"} <= set(names)
    assert all(one["total"]["median"] >= one["blocking"]["median"] > 0 for one in told["writes"])
    sizes = {one["name"]: one["gigabytes"] for one in told["writes"]}
    state = told["num_parameters"] * 12 / 1e9
    for name, size in sizes.items():
        assert size == pytest.approx(state, rel=0.02) or (
            size > state and name.startswith(("dd", "DeepSpeed", "torch"))
        )
    assert len(told["loads"]) == 3 and told["steps"]["beside a save"]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_cannot_be_measured_is_refused(capsys):
    words = ["--gigabytes", "0", "--repetitions", "0", "--length", "1"]
    assert cli.main(["bench", "checkpoint", *words]) == 2
    told = capsys.readouterr().err
    for line in ("gigabytes = 0.0: above 0", "repetitions = 0: at least 1", "length = 1: at least 2"):
        assert line in told


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(Fault, match=r"3.0 GB are needed, 0.0 GB are there"):
        checkpoint.compare(checkpoint.Settings(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []
