"""A torn or damaged checkpoint is found out whichever file it is, named, and the one before it is used instead."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from cpt_harness.ranks import on_ranks

from cpt.checkpoint import Checkpoint, Content, RunFolder, damage, find_checkpoint, step_folder, write_checkpoint
from cpt.checkpoint.damage import damage_of
from cpt.checkpoint.write import checkpoint_folders, checksum
from cpt.config import Fault
from cpt.parallel.mesh import ALONE
from cpt.parallel.weights import Piece

FILES = ("checksums.json", "index.json", "pieces-00000.safetensors", "state.json")


def save(folder: Path, note: int = 0) -> Path:
    values = torch.arange(6.0) + note
    pieces = [Piece("weight", (2, 3), 0, 6, values, {})]
    write_checkpoint(folder, Content(pieces, {"master": [values]}, {"note": note}), ALONE)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


HARMS = [flip, truncate, empty, Path.unlink]


@pytest.fixture
def two_ranks(tmp_path) -> Path:
    """Checkpoints of steps 1 and 2, each of two ranks."""

    def work(mesh):
        values = torch.arange(3.0) + mesh.rank
        pieces = [Piece("weight", (2, 3), 3 * mesh.rank, 3 * mesh.rank + 3, values, {})]
        for step in (1, 2):
            content = Content(pieces, {"master": [values], "exp_avg": [values]}, {"note": step})
            write_checkpoint(step_folder(tmp_path / "two", step), content, mesh)

    on_ranks(2, work)
    return tmp_path / "two"


@pytest.fixture
def three(tmp_path) -> Path:
    """Checkpoints of steps 1, 2 and 10."""
    for step in (1, 2, 10):
        save(step_folder(tmp_path / "three", step), step)
    return tmp_path / "three"


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_harm_to_any_file_is_found_and_the_file_is_named(tmp_path, name, harm):
    folder = save(tmp_path / "step-00000001")
    harm(folder / name)
    with pytest.raises(Fault) as found:
        Checkpoint(folder)
    assert str(folder / name) in str(found.value)


def harms_of(content: bytes) -> Iterator[bytes | None]:
    """Every other content that one byte makes, in two ways, a line's end in four; every shorter one; and no file."""
    for place, byte in enumerate(content):
        for other in (byte ^ 1 << place % 8, byte ^ 0xFF, *([0x20, 0x0D] if byte == 0x0A else [])):
            yield content[:place] + bytes([other]) + content[place + 1 :]
    yield from (content[:length] for length in range(len(content)))
    yield None


def test_every_byte_that_is_another_and_every_length_of_every_file_is_found_named_and_the_one_before_used(
    two_ranks, tell
):
    """The files are small, so this goes through all of them; a line's end that becomes a space or another is in it."""
    newest, num_cases, num_expected = step_folder(two_ranks, 2), 0, 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for harmed in harms_of(content):
            path.unlink() if harmed is None else path.write_bytes(harmed)
            with pytest.raises(Fault) as found:
                Checkpoint(newest)
            assert path.name in str(found.value), (path.name, num_cases)
            num_cases += 1
            if num_cases % 97 == 0:
                assert find_checkpoint(two_ranks).state["note"] == 1
                assert any(path.name in line for line in damage_of(newest))
        num_expected += 3 * len(content) + 2 * content.count(b"\n") + 1
        path.write_bytes(content)
    assert Checkpoint(newest).state["note"] == 2 and damage_of(newest) == []
    assert num_cases == num_expected > 3000
    tell(f"{num_cases} cases of damage, all found and named")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors["master"]["weight"]["pieces"].pop(), "master of weight: its pieces do not hold every"),
        (lambda tensors: tensors["master"]["weight"]["pieces"].append([0, 6, "pieces-00000.safetensors", "x"]),
         "master of weight: its pieces do not hold every element exactly once"),
        (lambda tensors: tensors["master"]["weight"]["pieces"][0].append([0, 2]), "its pieces do not hold every"),
        (lambda tensors: tensors.update(exp_avg={}), "exp_avg of weight is missing"),
        (lambda tensors: tensors["master"].clear(), "there are no weights"),
        (lambda tensors: tensors["exp_avg"].update(bias=tensors["master"]["weight"]),
         "exp_avg of bias is there, and no weights of that name"),
        (lambda tensors: tensors["exp_avg"]["weight"].update(shape=[3, 2]), "exp_avg of weight is [3, 2], its weights"),
        (lambda tensors: tensors["master"]["weight"]["pieces"][0].__setitem__(3, "other"),
         "pieces-00000.safetensors: other has no elements, the index says 6"),
        (lambda tensors: [kind["weight"].update(shape=[2, 6]) for kind in tensors.values()] and
         tensors["master"]["weight"]["pieces"][0].__setitem__(1, 12), "master|weight|0 has 6 elements, the index says"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_itself_or_the_pieces_is_told_though_its_checksum_is_right(tmp_path, change, told):
    folder = tmp_path / "step-00000001"
    values = torch.arange(6.0)
    content = Content([Piece("weight", (2, 3), 0, 6, values, {})], {"master": [values], "exp_avg": [values]}, {})
    write_checkpoint(folder, content, ALONE)
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"])
    (folder / "index.json").write_text(json.dumps(index))
    assert any(told in line for line in damage_of(with_new_sums(folder))), damage_of(folder)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_the_newest_whole_checkpoint_is_used_and_a_warning_says_what_is_wrong_with_the_newer(
    three, caplog, monkeypatch, name, harm
):
    monkeypatch.setattr(logging.getLogger("cpt"), "propagate", True)  # a command in an earlier test may have cut it
    harm(three / "step-00000010" / name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(three).state["note"] == 2
    assert str(three / "step-00000010" / name) in caplog.text and "trying the one before" in caplog.text


def test_the_newest_is_that_of_the_highest_step(three):
    assert find_checkpoint(three).state["note"] == 10
    save(three / "step-100000000", 11)  # more digits than are written out
    assert find_checkpoint(three).state["note"] == 11


def test_a_step_can_be_named_and_a_wrong_one_is_told_with_those_that_there_are(three):
    assert find_checkpoint(three, 2).state["note"] == 2
    assert find_checkpoint(three, "1").state["note"] == 1
    with pytest.raises(Fault, match=r"no checkpoint at step 3; there are: 1, 2, 10"):
        find_checkpoint(three, 3)


def test_a_damaged_step_that_was_named_is_not_replaced_by_another(three):
    flip(three / "step-00000002" / "index.json")
    with pytest.raises(Fault, match="step-00000002/index.json has changed"):
        find_checkpoint(three, 2)


def test_if_none_is_whole_all_are_told_and_if_there_is_none_that_is_no_fault(three, tmp_path):
    for folder in checkpoint_folders(three):
        flip(folder / "state.json")
    with pytest.raises(Fault) as found:
        find_checkpoint(three)
    assert len(found.value.lines) == 4 and "no checkpoint is whole" in found.value.lines[0]
    assert find_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", FILES)
def test_if_the_disk_gives_none_that_may_pass_but_not_if_one_has_changed(three, monkeypatch, name):
    def fails(path: Path, *more, _give, **named):
        if path.name == name and path.parent.parent == three:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return _give(path, *more, **named)

    monkeypatch.setattr(damage, "checksum", partial(fails, _give=damage.checksum))
    if not name.startswith("pieces"):
        give = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: fails(path, _give=give))
    with pytest.raises(Fault, match="Input/output error") as found:
        find_checkpoint(three)
    assert "damaged" not in str(found.value)
    assert found.value.is_passing and len(found.value.lines) == 4
    monkeypatch.undo()
    for folder in checkpoint_folders(three):
        flip(folder / name)
    with pytest.raises(Fault) as found:
        find_checkpoint(three)
    assert not found.value.is_passing


def test_a_folder_that_was_being_written_counts_for_nothing(three):
    shutil.copytree(three / "step-00000010", three / ".step-00000011.aside")
    assert find_checkpoint(three).state["note"] == 10


def test_a_copy_that_somebody_named_is_neither_taken_nor_removed(three):
    shutil.copytree(three / "step-00000002", three / "step-00000002-best")
    run = RunFolder(three.parent / "run")
    run.path.mkdir()
    three.rename(run.checkpoints)
    assert find_checkpoint(run.checkpoints).state["note"] == 10
    run.keep_newest(run.checkpoint_at(10), 1)
    assert sorted(f.name for f in run.checkpoints.iterdir()) == ["latest", "step-00000002-best", "step-00000010"]


def test_another_format_is_told(tmp_path):
    folder = save(tmp_path / "step-00000001")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": 99}))
    with pytest.raises(Fault, match="format 99, this version of cpt reads 1 and 2"):
        Checkpoint(with_new_sums(folder))


def with_new_sums(folder: Path) -> Path:
    sums = {path.name: checksum(path) for path in folder.iterdir() if path.name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1))
    return folder


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
@pytest.mark.parametrize("name", ["checksums.json", "index.json", "state.json"])
def test_json_that_is_something_else_is_told(tmp_path, name, content):
    folder = save(tmp_path / "step-00000001")
    (folder / name).write_text(content)
    with pytest.raises(Fault, match=name):
        Checkpoint(folder if name == "checksums.json" else with_new_sums(folder))


def test_a_file_that_the_checksums_leave_out_is_told(tmp_path):
    folder = save(tmp_path / "step-00000001")
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["pieces-00000.safetensors"]
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1))
    with pytest.raises(Fault, match="checksums.json does not name pieces-00000.safetensors"):
        Checkpoint(folder)
