"""The sbatch files in docs/CLUSTER.md are what its commands print; `python` with this file writes them anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "CLUSTER.md"
EXAMPLE = re.compile(r"```sh\n(cpt submit [^\n]*--dry-run)\n```\n\n```bash\n(.*?)```", re.DOTALL)
HOME = "/home/ada/cpt"  # where the reader of the page is


def printed(command: str, data: Path, folder: Path) -> str:
    """What a command of the page prints in `folder`, with the paths of the page."""
    from cpt_harness import runs

    from cpt.cli import main

    plain = runs.settings(data, Path("runs/mine"), [runs.stage(data, "prose", 20)])
    plain["batch"] = {"windows": 32, "micro_batch": 1}
    runs.write_settings(folder / "my.yaml", plain)
    before, out = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            assert main(shlex.split(command)[1:]) == 0
    finally:
        os.chdir(before)
    text = out.getvalue().replace(shlex.quote(sys.executable), f"{HOME}/.venv/bin/python")
    return text.replace(str(folder), HOME)


def test_the_examples_of_the_page_are_what_their_commands_print(data, tmp_path):
    examples = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) == 2
    for command, text in examples:
        assert text == printed(command, data, tmp_path)


def test_a_dry_run_has_left_nothing(data, tmp_path):
    printed("cpt submit my.yaml --dry-run", data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests" / "harness"), str(ROOT / "launcher"), str(ROOT / "kernels"), str(ROOT)]
    from cpt_harness import runs

    with tempfile.TemporaryDirectory() as scratch:
        data = runs.write_data(Path(scratch) / "data")
        folder = Path(scratch) / "here"
        folder.mkdir()

        def anew(found: re.Match) -> str:
            return f"```sh\n{found[1]}\n```\n\n```bash\n{printed(found[1], data, folder)}```"

        PAGE.write_text(EXAMPLE.sub(anew, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
