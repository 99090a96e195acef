"""What a run writes, nobody but its owner can change."""

from __future__ import annotations

import os
import stat

from cpt_harness import faults, runs


def test_nothing_in_a_run_folder_can_be_changed_by_others_whatever_the_umask(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 6)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with faults.started(config, number=2, folder=tmp_path, before=lambda rank: os.umask(0)) as ranks:
        assert ranks.wait() == [0, 0]
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(found) > 20
    for path in found:
        assert not path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_a_stricter_umask_stays(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 2)])
    config = runs.write_settings(tmp_path / "run.yaml", plain)
    with faults.started(config, number=1, folder=tmp_path, before=lambda rank: os.umask(0o077)) as ranks:
        assert ranks.wait() == [0]
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run" / "metrics.jsonl").stat().st_mode) == 0o600
