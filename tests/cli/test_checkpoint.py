"""`cpt checkpoint` tells what is there, finds what is damaged, and removes only what the policy does not keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from cpt_harness import runs

from cpt import cli
from cpt.checkpoint import damage, find_checkpoint
from cpt.checkpoint.write import step_folder
from cpt.run import read_run
from cpt.run.beginning import refuse_bad_beginning


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """A run of 12 steps, saved at each second one, that keeps four; steps 6 and 12 for ever."""
    folder = tmp_path_factory.mktemp("made")
    kept = {"every_tokens": 2 * runs.TOKENS_A_STEP, "keep_last": 4, "keep_every_tokens": 6 * runs.TOKENS_A_STEP}
    plain = runs.settings(data, folder / "run", [runs.stage(data, "prose", 12)], checkpoint=kept, methods=["reptile"])
    runs.trained(runs.write_settings(folder / "run.yaml", plain))
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return runs.copy(made, tmp_path / "run")


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_inspect_tells_a_line_for_each_checkpoint(made, capsys):
    assert cli.main(["checkpoint", "inspect", str(made)]) == 0
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{made}  (no parent)"
    assert names.split() == ["step", "tokens", "stage", "kept", "tensors", "parameters", "GB", "kinds"]
    assert [line.split()[0] for line in lines] == ["6", "8", "10", "12"]
    assert lines[0].split()[1:5] == ["576", "prose", "for", "ever"] and lines[1].split()[1:5] == [
        "768", "prose", "among", "last"
    ]  # fmt: skip
    assert lines[0].split()[-4:] == ["exp_avg", "exp_avg_sq", "master", "method/reptile/anchor"]


def test_inspect_as_json_counts_what_is_there(made, capsys):
    folder = step_folder(made / "checkpoints", 8)
    assert cli.main(["checkpoint", "inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (one,) = told["checkpoints"]
    weights = find_checkpoint(made / "checkpoints", 8).weights()
    assert told["parent"] is None and one["step"] == 8 and one["kept"] == "among last"
    assert one["num_tensors"] == len(weights)
    assert one["num_parameters"] == sum(values.numel() for values in weights.values())
    assert one["num_bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_inspect_tells_damage_that_a_look_shows_and_the_parent(run, capsys):
    (step_folder(run / "checkpoints", 8) / "state.json").unlink()
    lineage = {"run": "run", "parent": {"run": "../base", "step": 7, "tokens": 9, "learning_rate": 0.1}}
    (run / "lineage.json").write_text(json.dumps(lineage))
    assert cli.main(["checkpoint", "inspect", str(run)]) == 0
    head, _, _, line, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith(f"(a child of {run.parent}/base at step 7)")
    assert "8  damaged: " in line and "step-00000008/state.json is missing" in line


NAMES = [
    *(("index.json", name) for name in ("format_version", "tensors", "master", "shape", "pieces")),
    *(("state.json", name) for name in ("progress", "tokens", "stage", "rate", "ledger")),
]


def test_one_that_was_put_by_can_be_looked_at_and_a_folder_of_another_name_is_no_checkpoint(run, capsys):
    folder = step_folder(run / "checkpoints", steps_in(run)[-1])
    put_by = folder.rename(folder.with_name(f"{folder.name}-unread"))
    assert cli.main(["checkpoint", "inspect", str(put_by)]) == 0
    assert cli.main(["checkpoint", "verify", str(put_by)]) == 0
    other = put_by.rename(put_by.with_name("step-mine"))
    assert cli.main(["checkpoint", "inspect", str(other)]) == 2
    assert "step-mine: no checkpoint is here" in capsys.readouterr().err


def rename_in(path: Path, name: str) -> None:
    """One byte of a file: the first letter of the first of these names becomes an x."""
    text = path.read_text()
    assert f'"{name}"' in text
    path.write_text(text.replace(f'"{name}"', f'"x{name[1:]}"', 1))


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_inspect_tells_a_name_that_has_changed_as_damage_and_goes_on(run, capsys, file, name):
    rename_in(step_folder(run / "checkpoints", 8) / file, name)
    assert cli.main(["checkpoint", "inspect", str(run)]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["6", "8", "10", "12"]
    assert f"8  damaged: {step_folder(run / 'checkpoints', 8)}/{file} has changed" in lines[1]
    assert not [line for line in lines if "damaged" in line and line != lines[1]]


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_what_is_looked_at_before_a_run_goes_on_passes_by_a_checkpoint_in_which_a_name_has_changed(run, file, name):
    plain = read_run([str(run / "run.yaml"), f"output={run}"])
    rename_in(step_folder(run / "checkpoints", 12) / file, name)
    assert find_checkpoint(run / "checkpoints", check=False).folder.name == "step-00000010"
    refuse_bad_beginning(plain)


def test_verify_finds_all_whole(made, capsys):
    assert cli.main(["checkpoint", "verify", str(made)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 whole"


@pytest.mark.parametrize("name", ["checksums.json", "index.json", "state.json", "pieces-00000.safetensors"])
def test_verify_names_a_damaged_file_and_ends_with_1(run, capsys, name):
    flip(step_folder(run / "checkpoints", 10) / name)
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 of 4 whole"
    assert [line for line in lines if line.startswith("DAMAGED") and f"step-00000010/{name}" in line]
    assert cli.main(["checkpoint", "verify", str(step_folder(run / "checkpoints", 10))]) == 1
    assert cli.main(["checkpoint", "verify", str(step_folder(run / "checkpoints", 8))]) == 0


def test_prune_keeps_as_the_run_says_or_as_asked_and_those_for_ever(run, capsys):
    assert cli.main(["checkpoint", "prune", str(run)]) == 0
    assert steps_in(run) == [6, 8, 10, 12]
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "2", "--dry-run"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert steps_in(run) == [6, 8, 10, 12] and told[-1] == "3 stay"
    assert told[-2] == f"would go  {step_folder(run / 'checkpoints', 8)}"
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert steps_in(run) == [6, 12] and told[-1] == "2 stay" and told[0].startswith("removed  ")


def test_prune_never_removes_the_newest_that_is_whole(run):
    for step in (10, 12):
        flip(step_folder(run / "checkpoints", step) / "index.json")
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert steps_in(run) == [6, 8]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008\n"
    assert find_checkpoint(run / "checkpoints").folder.name == "step-00000008"


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", ["checksums.json", "pieces-00000.safetensors"])
def test_prune_removes_nothing_when_a_disk_does_not_give_the_newest_which_may_be_whole(
    run, capsys, monkeypatch, name, words
):
    def fails(path, *more, give):
        if path == step_folder(run / "checkpoints", 12) / name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return give(path, *more)

    monkeypatch.setattr(damage, "checksum", partial(fails, give=damage.checksum))
    give = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: fails(path, give=give))
    latest = (run / "checkpoints" / "latest").read_text()
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1", *words]) == 1
    told = capsys.readouterr().err
    assert "nothing was removed" in told and f"step-00000012/{name} cannot be read: " in told
    assert steps_in(run) == [6, 8, 10, 12] and (run / "checkpoints" / "latest").read_text() == latest


def test_prune_counts_no_checkpoint_that_was_put_by(run, capsys):
    for step in (11, 13):
        (run / "checkpoints" / f"step-{step:08d}-unread").mkdir()
    assert cli.main(["checkpoint", "prune", str(run), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"would go  {run}/checkpoints/step-00000011-unread", "4 stay"]


def test_prune_is_refused_while_somebody_trains_there(run, capsys):
    lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 1
    finally:
        os.close(lock)
    assert "another process is training there" in capsys.readouterr().err
    assert steps_in(run) == [6, 8, 10, 12]


def test_what_prune_cannot_remove_is_told_with_status_1(run, capsys, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 1
    assert "still there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "."], "no checkpoint is here; name a run folder that has saved, or .../checkpoints/step-..."),
        (["verify", "nowhere"], "no checkpoint is here"),
        (["prune", "."], "there is no run (no run.yaml)"),
    ],
)
def test_a_folder_without_checkpoints_is_told(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["checkpoint", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_run_without_checkpoints_and_a_number_below_one_are_told(run, capsys):
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert "--keep = 0: at least 1" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["checkpoint", "prune", str(run)]) == 2
    assert "the run has saved no checkpoint yet" in capsys.readouterr().err
