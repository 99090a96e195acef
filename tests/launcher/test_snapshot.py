"""The copy that a job runs from is the checkout's code, and nobody but its owner may change it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cpt_launcher import snapshot as module
from cpt_launcher.snapshot import snapshot


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout that anybody may write to, as file systems without modes show one."""
    root = tmp_path / "checkout"
    for name in ("launcher/run.py", "launcher/rooms/one.py", "cpt/train.py", "kernels/one.cu", "cpt/__pycache__/a.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for path in (root, *root.rglob("*")):
        path.chmod(0o777)
    monkeypatch.setattr(module, "code_folder", lambda: root)
    return root


@pytest.mark.parametrize(
    ("umask", "modes"), [(0o000, (0o755, 0o644)), (0o022, (0o755, 0o644)), (0o077, (0o700, 0o600))]
)
def test_nobody_else_may_write_to_the_copy_of_a_checkout_that_all_may_write_to(checkout, tmp_path, umask, modes):
    before = os.umask(umask)
    try:
        with snapshot(tmp_path / "run" / "snapshot" / "0001") as place:
            (place / "config.yaml").write_text("seed: 1")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    copied = [place.parent, place, *place.rglob("*")]
    files = {str(path.relative_to(place)) for path in copied if path.is_file()}
    assert files == {"launcher/run.py", "launcher/rooms/one.py", "cpt/train.py", "kernels/one.cu", "config.yaml"}
    for path in copied:
        assert stat.S_IMODE(path.stat().st_mode) == modes[path.is_file()], path
