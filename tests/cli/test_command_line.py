"""The command line: help, exit statuses, one line for a user's mistake, no traceback, no noise when a reader goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt import __version__, cli
from cpt.config import Fault, names_of_choices

ROOT = Path(__file__).parents[2]
COMMANDS = [name.replace("_", "-") for name in names_of_choices("cpt.cli")]


@pytest.fixture
def told(capsys):
    """Run a command: its status, what it printed, and what it told on standard error, as lines."""

    def run(*words: str) -> tuple[int, list[str], list[str]]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def lineage_raises(monkeypatch):
    """Let `cpt lineage` raise an error."""

    def raising(error: BaseException) -> None:
        def run(arguments):
            raise error

        monkeypatch.setattr("cpt.cli.lineage.run", run)

    return raising


def test_the_overview_names_every_command_with_one_line_of_help(told):
    status, lines, _ = told("--help")
    assert status == 0
    for command in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [command]]
        assert len(line.split()) > 3
    assert told("-h")[:2] == (0, lines)


def test_no_words_get_the_overview_and_status_2(told):
    status, lines, _ = told()
    assert status == 2
    assert lines == told("--help")[1]


def test_the_version_is_told(told):
    assert told("--version") == (0, [f"cpt {__version__}"], [])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(told, command):
    status, lines, _ = told(command, "--help")
    assert status == 0
    assert lines[0].startswith(f"usage: cpt {command} ")
    assert lines[-2] == "example:"
    assert lines[-1].startswith(f"  cpt {command} ")


def test_an_unknown_command_gets_the_nearest(told):
    assert told("trian") == (2, [], ["cpt: trian: there is no such command; did you mean train?"])


def test_a_name_with_an_underscore_is_no_command(told):
    assert told("_models")[0] == 2
    assert told("verify_order")[2] == ["cpt: verify_order: there is no such command; did you mean verify-order?"]


@pytest.mark.parametrize(
    "words", [["train"], ["lineage"], ["verify-order", "a"], ["verify-order", "a", "b", "c"], ["train", "--bad"]]
)
def test_wrong_words_are_told_with_status_2(told, words):
    status, _, errors = told(*words)
    assert status == 2
    assert errors[0].startswith(f"usage: cpt {words[0]} ")
    assert "error: " in errors[-1]


def test_every_fault_is_one_line_and_the_status_is_2(told, tmp_path):
    status, out, errors = told("train", str(tmp_path / "nowhere.yaml"), "=5")
    assert (status, out) == (2, [])
    assert errors == [
        f"cpt train: {tmp_path}/nowhere.yaml: there is no such file; name a YAML file of settings, "
        "then key=value words",
        "cpt train: =5: write it as key=value, such as seed=2 or batch.windows=64",
    ]


def test_faults_in_settings_are_told_all_at_once(told):
    status, _, errors = told("train", "sed=2", "zero=9")
    assert status == 2
    assert errors == [
        "cpt train: sed: there is no such setting; did you mean seed?",
        "cpt train: output is not set; it has no default",
        "cpt train: stages is not set; it has no default",
        "cpt train: zero = 9 is not known; known: 0, 1, 2, 3",
    ]


def test_what_the_machine_refuses_is_one_line_and_status_1(told, lineage_raises):
    lineage_raises(OSError(28, "No space left on device", "/full/disk"))
    assert told("lineage", "x") == (1, [], ["cpt lineage: /full/disk: No space left on device"])
    lineage_raises(OSError("something else"))
    assert told("lineage", "x") == (1, [], ["cpt lineage: something else"])


def test_ctrl_c_is_status_130(told, lineage_raises):
    lineage_raises(KeyboardInterrupt())
    assert told("lineage", "x") == (130, [], ["cpt lineage: stopped"])


def test_our_own_errors_keep_their_traceback(told, lineage_raises):
    lineage_raises(ValueError("ours"))
    with pytest.raises(ValueError, match="ours"):
        told("lineage", "x")


def test_a_fault_of_several_lines_is_told_line_by_line(told, lineage_raises):
    lineage_raises(Fault(["one", "two"]))
    assert told("lineage", "x") == (2, [], ["cpt lineage: one", "cpt lineage: two"])


def in_a_process(*words: str, unbuffered: bool, **named) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "launcher")))}
    environment["PYTHONUNBUFFERED"] = "1" if unbuffered else ""
    code = "import sys; from cpt.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stderr=subprocess.PIPE, text=True, **named
    )


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", [["--help"], ["lineage", "--help"]])
def test_a_reader_that_goes_away_makes_no_noise(words, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    process = in_a_process(*words, unbuffered=unbuffered, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


def test_a_broken_pipe_of_another_kind_is_no_success(lineage_raises, capfd):
    lineage_raises(BrokenPipeError(32, "Broken pipe"))
    with pytest.raises(BrokenPipeError):
        cli.main(["lineage", "x"])


def test_the_command_runs_as_a_module_where_nothing_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "cpt.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"cpt {__version__}\n"), done.stderr
