"""What cannot work is told in clear lines, with exit status 2, before anything is written or changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from cpt_harness import runs
from cpt_harness.ranks import in_processes

from cpt.checkpoint import RunFolder


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, but logs, and a hash of it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }


def refused(*words: object, ranks: int = 1, status: int = 2, **named) -> str:
    """What is told on standard error; fails unless all end with that status and only the first rank tells."""
    ended = runs.cpt("train", *words, ranks=ranks, **named)
    assert [one for one, _ in ended] == [status] * ranks, ended
    assert [told for _, told in ended[1:]] == [""] * (ranks - 1)
    assert "Traceback" not in ended[0][1]
    return ended[0][1]


@pytest.fixture
def config(data, tmp_path) -> Path:
    return runs.write_settings(
        tmp_path / "run.yaml", runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 4)])
    )


def of_child(data, tmp_path, above: Path, **more) -> Path:
    plain = runs.settings(data, tmp_path / "child", [runs.stage(data, "code", 3)], parent={"run": str(above)})
    del plain["model"], plain["sequence_length"]
    return runs.write_settings(tmp_path / "child.yaml", {**plain, **more})


# ---- the output folder


def test_a_finished_run_says_so_and_changes_nothing(base):
    before = contents(base)
    told = runs.trained(base / "run.yaml")
    assert f"{base} is finished; nothing to do" in told
    assert contents(base) == before


def test_a_run_with_other_settings_is_not_gone_on_with_and_each_difference_is_told(base):
    before = contents(base)
    told = refused(base / "run.yaml", "seed=7", "stages.0.schedule.peak=1e-3")
    assert f"output = {base} holds another run; name another output, or set these back:" in told
    assert "seed is 7, the run began with 1" in told
    assert "stages.0.schedule.peak is 0.001, the run began with 0.005" in told
    assert told.count("the run began with") == 2
    assert contents(base) == before


def test_settings_that_change_no_result_may_be_changed_when_a_run_is_gone_on_with(base, tmp_path):
    words = ["zero=2", "batch.micro_batch=2", "log.every_steps=3", "checkpoint.keep_last=1", f"output={tmp_path / 'b'}"]
    runs.copy(base, tmp_path / "b")
    assert "is finished" in runs.trained(base / "run.yaml", *words)


def test_a_folder_with_foreign_files_is_refused_and_stays_as_it_is(config, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("the only copy")
    told = refused(config, f"output={tmp_path / 'thesis'}")
    assert "the folder is used, but not by a run" in told
    assert contents(tmp_path / "thesis").keys() == {"chapter.tex"}


def test_a_file_in_place_of_the_folder_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert "this is a file; name a folder" in refused(config, f"output={tmp_path / 'file'}")


# ---- parents


def test_an_unfinished_parent_is_refused_unless_its_step_is_named(data, base, tmp_path):
    parent = runs.copy(base, tmp_path / "parent")
    (parent / "finished.json").unlink()
    config = of_child(data, tmp_path, parent)
    told = refused(config)
    assert f"parent.run = {parent} is not finished; start it again to let it finish, or name a step" in told
    assert not (tmp_path / "child").exists()
    runs.trained(config, "parent.at=15")
    first = runs.lines(tmp_path / "child" / "scores.jsonl")[0]
    assert first["loss"] != pytest.approx(runs.lines(base / "scores.jsonl")[-2]["loss"], abs=1e-6)


def test_a_parent_without_a_checkpoint_or_without_that_step_is_told(data, base, tmp_path):
    parent = runs.copy(base, tmp_path / "parent")
    config = of_child(data, tmp_path, parent)
    assert "there is no checkpoint at step 7; there are: 15, 20" in refused(config, "parent.at=7")
    shutil.rmtree(parent / "checkpoints")
    assert f"parent.run = {parent} has no checkpoint" in refused(config)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_parent_of_another_shape_is_refused_and_leaves_nothing_behind(data, base, tmp_path, ranks):
    config = of_child(data, tmp_path, base, model={**runs.MODEL, "layers": 1}, sequence_length=runs.LENGTH)
    told = refused(config, ranks=ranks)
    assert "blocks.1.attention.query.weight is [24, 24], the model has none" in told
    assert not (tmp_path / "child").exists()


def test_moments_are_kept_from_a_parent_that_has_them(data, base, tmp_path):
    config = of_child(data, tmp_path, base, optimizer_state="keep")
    runs.trained(config)
    kept = RunFolder(tmp_path / "child").latest().state["optimizer_updates"]
    runs.trained(config, "optimizer_state=reset", f"output={tmp_path / 'reset'}")
    assert (kept, RunFolder(tmp_path / "reset").latest().state["optimizer_updates"]) == (23, 3)


def test_a_damaged_parent_checkpoint_is_told_and_the_one_before_is_used(data, base, tmp_path):
    parent = runs.copy(base, tmp_path / "parent")
    (parent / "checkpoints" / "step-00000020" / "state.json").write_text("{}")
    told = runs.trained(of_child(data, tmp_path, parent))
    assert "step-00000020/state.json has changed since it was written" in told
    assert f"a child of {parent} at step 15" in told


# ---- stages and batch


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"sources": {"gone": {"corpus": "no/such/corpus"}}}, "stages.1.sources.gone: there is no corpus at"),
        ({"sources": {"short": {"corpus": "SHORT"}}}, "stages.1: SHORT holds 20 tokens, less than two windows of 13"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_later_stage_is_told_before_the_first_begins(data, tmp_path, second, told):
    short = runs.write_corpus(tmp_path / "short", data / "tokenizer", 1, 3, 1, lengths=(20, 21))
    stages = [runs.stage(data, "prose", 2), {**runs.stage(data, "code", 2), **second}]
    text = yaml.safe_dump(runs.settings(data, tmp_path / "run", stages)).replace("SHORT", str(short))
    (tmp_path / "run.yaml").write_text(text)
    assert told.replace("SHORT", str(short)) in refused(tmp_path / "run.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kernel_that_the_device_cannot_run_is_told_with_those_that_it_can(config, tmp_path, ranks):
    told = refused(config, "kernels.attention=flash", ranks=ranks)
    assert "kernels.attention = flash cannot serve on cpu: it needs a CUDA device; use auto, plain, torch" in told
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_cut_is_told_once_by_one_of_the_ranks(config, tmp_path):
    told = refused(config, "batch.windows=9", "batch.micro_batch=null", ranks=2)
    assert "batch.windows = 9 cannot be cut over 2 ranks" in told
    assert not (tmp_path / "run").exists()


def test_a_taken_port_is_one_clear_line(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def first_of_two():
            os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

        told = refused(config, before=first_of_two, status=1)  # at the next start it may be free
    assert told.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is taken by another program; name a free port" in told
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_alone_gives_up_with_a_line_when_the_time_is_up(config):
    def second_of_two():
        os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")

    told = refused(config, "mesh.timeout_seconds=2", before=second_of_two, status=1)
    assert f"rank 1 on {socket.gethostname()} could not meet the others at 127.0.0.1:1: " in told


def test_no_settings_at_all_and_wrong_ones_end_with_2():
    def no_words():
        from cpt.cli import main

        return main(["train"])

    assert in_processes([no_words]) == [2]
    assert "there is no such file" in refused("nothing.yaml")
