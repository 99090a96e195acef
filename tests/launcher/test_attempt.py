"""Nothing of a command is waited for without end, not even a process that cannot be killed."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from cpt_harness import disks, runs

from cpt_launcher import attempt as attempts


@pytest.fixture
def unkillable(tmp_path, monkeypatch):
    """An attempt whose process waits for a disk that does not answer."""
    monkeypatch.setattr(attempts, "_DYING_SECONDS", 0.5)
    with disks.on_device(tmp_path / "disk", 16 * disks.MIB) as disk:
        disk.freeze()
        write = f"open({str(disk.path / 'file')!r}, 'wb')"
        try:
            started = attempts.Attempt([sys.executable, "-c", write])
            runs.wait_for(lambda: [one for one in started.left() if one.status() == psutil.STATUS_DISK_SLEEP], "it")
            yield started
        finally:
            subprocess.run([sys.executable, "-c", disks.thawing(disk.path)], check=True)
            runs.wait_for(lambda: not started.left(), "its end")


def test_a_process_that_cannot_be_killed_is_told_and_left(unkillable):
    # What an earlier test may have left to this process is told beside it.
    (told,) = (line for line in unkillable.clear(0.0) if "open(" in line)
    assert told.endswith("which is there still: a disk or a device does not answer it")


def test_a_command_that_cannot_be_killed_is_known_as_such(unkillable):
    assert not unkillable.is_unkillable()
    unkillable.kill()
    runs.wait_for(unkillable.is_unkillable, "half a second")
    assert unkillable.status() is None
