"""A build that stopped goes on only as what it was, one at a time, and says what else would do."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from cpt.config import Fault
from cpt.data.prepare import build as building
from cpt.data.prepare.build import build_corpus
from cpt.data.prepare.work_folder import work_folder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    made.save(str(tmp_path / "t" / "tokenizer.json"))
    return tmp_path / "t"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(30)))
    return path


@pytest.fixture
def often(monkeypatch) -> None:
    """A checkpoint after every few documents."""
    monkeypatch.setattr(building, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 60)


def stop_late(monkeypatch, error: BaseException) -> None:
    """Lets the build end in this error when the documents are read."""

    def stop(*_):
        raise error

    monkeypatch.setattr(building, "refuse_empty", stop)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if made.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return made.returncode == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(tmp_path, text, tokenizer, often, monkeypatch) -> Path:
    """The work folder of a build of `c` that was stopped by Ctrl-C."""
    with monkeypatch.context() as patched:
        stop_late(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_corpus([text], tokenizer, tmp_path / "c")
    return tmp_path / "c.partial"


def test_ctrl_c_leaves_what_is_done_and_says_how_to_go_on(tmp_path, text, tokenizer, often, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        stop_late(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            build_corpus([text], tokenizer, tmp_path / "c")
    message = f"what is done is kept in {tmp_path}/c.partial; the same command goes on, --restart begins anew"
    assert message in caplog.messages
    assert not (tmp_path / "c").exists()
    with caplog.at_level(logging.INFO):
        build_corpus([text], tokenizer, tmp_path / "c")
    assert f"going on after 30 documents, from {tmp_path}/c.partial" in caplog.messages
    build_corpus([text], tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
    assert not (tmp_path / "c.partial").exists()


def test_ctrl_c_at_a_checkpoint_keeps_it(tmp_path, text, tokenizer, often, monkeypatch):
    replace = os.replace

    def replace_and_stop(source, target):
        replace(source, target)
        if Path(target).name == "journal.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_and_stop)
        with pytest.raises(KeyboardInterrupt):
            build_corpus([text], tokenizer, tmp_path / "c")
    assert (tmp_path / "c.partial" / "journal.json").exists()
    assert build_corpus([text], tokenizer, tmp_path / "c").num_documents == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 0.5}, r"c\.partial holds a build that was begun otherwise: holdout was 0\.0 and is now 0\.5; "),
        ({"append_eos": False}, "append_eos was True and is now False; give the command .* to go on, or --restart to"),
        ({"shuffle_seed": 1, "prepend_bos": False}, "shuffle_documents was None and is now 1; "),
        ({"shuffle_seed": 1, "append_eos": False}, r"append_eos was True and is now False \(and 1 more\); "),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, text, tokenizer, stopped, options, message):
    before = contents(stopped)
    with pytest.raises(Fault, match=message):
        build_corpus([text], tokenizer, tmp_path / "c", **options)
    after = contents(stopped)
    assert {name: after[name] for name in before if name != "build.lock"} == {
        name: before[name] for name in before if name != "build.lock"
    }


def test_another_tokenizer_is_refused(tmp_path, text, tokenizer, stopped):
    config = tokenizer / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(Fault, match=r"begun otherwise: tokenizer was \{'tokenizer.json': .* and is now .*config"):
        build_corpus([text], tokenizer, tmp_path / "c")
    config.unlink()
    made = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    made.add_special_tokens(["<another>"])
    made.save(str(tokenizer / "tokenizer.json"))
    with pytest.raises(Fault, match=r"begun otherwise: tokenizer was \{'tokenizer.json': '\w+'\} and is now"):
        build_corpus([text], tokenizer, tmp_path / "c")


def test_the_number_of_workers_may_change_and_errors_may_be_skipped_from_here_on(
    tmp_path, text, tokenizer, often, monkeypatch
):
    text.write_text(text.read_text() + "{broken\n")
    with pytest.raises(Fault, match=r"a\.jsonl:31: broken JSON"):
        build_corpus([text], tokenizer, tmp_path / "c")
    report = build_corpus([text], tokenizer, tmp_path / "c", on_error="skip", workers=2)
    assert (report.num_documents, report.skipped) == (30, {"broken JSON": 1})
    build_corpus([text], tokenizer, tmp_path / "whole", on_error="skip")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_inputs_that_changed_are_refused_and_named(tmp_path, text, tokenizer, stopped):
    (tmp_path / "b.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(Fault, match=r"inputs was \['.*a\.jsonl'\] and is now .* \(and 1 more\)"):
        build_corpus([text, tmp_path / "b.jsonl"], tokenizer, tmp_path / "c")
    text.write_text('{"text": "other"}\n')
    with pytest.raises(Fault, match=r"begun otherwise: the input .*a\.jsonl has changed; give the command"):
        build_corpus([text], tokenizer, tmp_path / "c")
    report = build_corpus([text], tokenizer, tmp_path / "c", restart=True)
    assert report.num_documents == 1


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["a", "b"], ["a"], "the input b is gone"),
        (["a"], ["a", "b"], "the input b is new"),
        (["a", "b"], ["b", "a"], "the inputs come in another order"),
    ],
)
def test_a_folder_of_inputs_must_hold_the_same_files(tmp_path, before, now, message):
    with pytest.raises(ZeroDivisionError), work_folder([tmp_path / "c"], {}, before) as work:
        work.write_checkpoint({"done": 1})
        raise ZeroDivisionError
    with pytest.raises(Fault, match=message), work_folder([tmp_path / "c"], {}, now):
        pass
    with work_folder([tmp_path / "c"], {}, before) as work:
        assert work.journal == {"done": 1}


def test_a_second_build_of_the_same_output_is_refused(tmp_path, text, tokenizer):
    with work_folder([tmp_path / "c"], {}, []) as work:
        message = rf"another build is writing .*c \(process {os.getpid()}\); wait for it or choose another --output"
        with pytest.raises(Fault, match=message):
            build_corpus([text], tokenizer, tmp_path / "c", restart=True)
        assert work.path.exists()
        work.remove()
    assert build_corpus([text], tokenizer, tmp_path / "c").num_documents == 30


def test_a_second_process_that_builds_the_same_output_is_refused(tmp_path, text, tokenizer):
    with work_folder([tmp_path / "c"], {}, []) as work:
        words = ["data", "build", text, "--tokenizer", tokenizer, "--output", tmp_path / "c"]
        script = f"import sys; from cpt import cli; sys.exit(cli.main({list(map(str, words))!r}))"
        second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert second.returncode == 2
        assert f"another build is writing {tmp_path}/c (process {os.getpid()}); wait for it" in second.stderr
        assert "Traceback" not in second.stderr
        work.remove()


def test_a_folder_that_is_not_of_a_build_is_left_alone(tmp_path, text, tokenizer):
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "mine").write_text("x")
    with pytest.raises(Fault, match=r"c\.partial is in the way and not of a build; move it, or choose another"):
        build_corpus([text], tokenizer, tmp_path / "c", restart=True)
    assert contents(tmp_path / "c.partial") == {"mine": b"x"}


def test_a_full_disk_in_the_middle_is_told_and_the_build_goes_on_later(tmp_path, text, tokenizer, often, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("cpt.data.shards._ChecksummedFile.write", full)
        message = r"the disk is full; free some space, then the same command goes on: '.*c\.partial'"
        with pytest.raises(OSError, match=message):
            build_corpus([text], tokenizer, tmp_path / "c")
    assert build_corpus([text], tokenizer, tmp_path / "c").num_documents == 30
    build_corpus([text], tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.skipif(not can_mount(), reason="only root can make a small disk")
def test_a_disk_that_is_full_in_the_middle_loses_nothing(tmp_path, tokenizer, often, monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARACTERS", 30_000)
    source = tmp_path / "big.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {number} " * 20}) + "\n" for number in range(3000)))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(OSError, match="the disk is full; free some space, then the same command goes on"):
            build_corpus([source], tokenizer, disk / "c")
        assert not (disk / "c").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        build_corpus([source], tokenizer, disk / "c")
        build_corpus([source], tokenizer, tmp_path / "whole")
        assert contents(disk / "c") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_build_from_standard_input_says_that_it_cannot_go_on_and_leaves_nothing(
    tmp_path, text, tokenizer, often, monkeypatch, caplog
):
    lines = text.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines + b"{broken\n")))
    with caplog.at_level(logging.INFO), pytest.raises(Fault, match="standard input:31: broken JSON"):
        build_corpus(["-"], tokenizer, tmp_path / "c")
    assert any("standard input cannot be read again" in message for message in caplog.messages)
    assert not list(tmp_path.glob("c*"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    report = build_corpus(["-"], tokenizer, tmp_path / "c", shard_tokens=50, shuffle_seed=1)
    assert (report.num_documents, report.num_shards) == (30, 8)


def test_an_output_taken_meanwhile_is_refused_and_the_build_can_be_published_later(
    tmp_path, text, tokenizer, monkeypatch
):
    publish = building.WorkFolder.publish

    def take(work, parts):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "mine").write_text("x")
        publish(work, parts)

    with monkeypatch.context() as patched:
        patched.setattr(building.WorkFolder, "publish", take)
        with pytest.raises(Fault, match="c is there already; choose another --output or remove it"):
            build_corpus([text], tokenizer, tmp_path / "c")
    (tmp_path / "c" / "mine").unlink()
    assert build_corpus([text], tokenizer, tmp_path / "c").num_documents == 30
    assert (tmp_path / "c" / "corpus.json").exists()


@pytest.mark.parametrize("name", ["journal.json", "settings.json"])
def test_a_damaged_journal_is_told(tmp_path, text, tokenizer, stopped, name):
    (stopped / name).write_text("{")
    with pytest.raises(Fault, match=rf"{name} is damaged .*; the build cannot go on: begin anew \(--restart\)"):
        build_corpus([text], tokenizer, tmp_path / "c")
    assert build_corpus([text], tokenizer, tmp_path / "c", restart=True).num_documents == 30


def test_a_journal_of_another_release_is_told(tmp_path, text, tokenizer, stopped):
    (stopped / "journal.json").write_text('{"position": [0, 0], "novelty": 1}')
    with pytest.raises(Fault, match=r"begun by another release and cannot go on; begin anew \(--restart\)"):
        build_corpus([text], tokenizer, tmp_path / "c")


def test_work_files_that_are_too_short_are_told(tmp_path, text, tokenizer, stopped):
    for path in (stopped / "spools").glob("*.tokens"):
        os.truncate(path, 3)
    message = r"\.tokens holds 3 bytes where the build left \d+; it cannot go on: begin anew \(--restart\)"
    with pytest.raises(Fault, match=message):
        build_corpus([text], tokenizer, tmp_path / "c")
