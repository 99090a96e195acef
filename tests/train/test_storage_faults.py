"""Disks that really fill up, break, freeze and are slow, and folders that go: what is told, what stands, what goes on.

The file systems are the kernel's own (cpt_harness.disks); where root may not mount any, these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cpt_harness import disks, runs

from cpt.checkpoint import find_checkpoint
from cpt.observe.attempts import read_attempts

STEPS, SAVED_EVERY = 40, 5


def config_in(data: Path, folder: Path, output: Path, steps: int = STEPS, **checkpoint) -> Path:
    """A run in `output` that saves every few steps and waits for each save."""
    plain = runs.settings(
        data, output, [runs.stage(data, "prose", steps)],
        checkpoint={"every_tokens": SAVED_EVERY * runs.TOKENS_A_STEP, **checkpoint},
    )  # fmt: skip
    return runs.write_settings(folder / "run.yaml", plain)


def after_step(faults: dict[int, Callable[[], object]]) -> Callable[[], None]:
    """For `before`: what happens right after these steps, once the first rank has told them."""

    def patch() -> None:
        from cpt.observe.journal import Journal

        tell = Journal.step

        def tell_and_fail(journal, record, num_tokens):
            tell(journal, record, num_tokens)
            faults.get(record["step"], lambda: None)()

        Journal.step = tell_and_fail

    return patch


def saved_in(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    return find_checkpoint(run / "checkpoints").state["progress"]["step"]


def assert_ends_as_if_unbroken(config: Path, run: Path, unbroken: Path, ranks: int = 1) -> None:
    """The same command again finishes the run, and it saw and computed what one in peace does."""
    runs.trained(config, ranks=ranks)
    runs.trained(config, f"output={unbroken}", ranks=ranks)
    found, expected = runs.story(run), runs.story(unbroken)
    for record in found["metrics"]:
        record.pop("checkpoint_failed", None)
    runs.assert_same_but_for_checkpoints(found, expected)


# ---- disks that take no more


def fill(folder: Path) -> None:
    """Take all the room that is left, to the last byte."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for num_bytes in (1 << 16, 1 << 10, 1):
            while True:
                try:
                    if file.write(bytes(num_bytes)) < num_bytes:
                        break
                except OSError:
                    break


@pytest.mark.parametrize(
    ("disk", "size", "told"),
    [(disks.in_memory, 4 * disks.MIB, "No space left on device"), (disks.with_quota, 3 << 20, "Disk quota exceeded")],
    ids=["full", "quota"],
)
def test_a_disk_that_takes_no_more_holds_back_saves_until_there_is_room(data, tmp_path, disk, size, told):
    with disk(tmp_path / "disk", size) as place:
        run = place / "run"
        config = config_in(data, tmp_path, run)
        faults = {12: lambda: fill(place), 32: (place / "ballast").unlink}
        said = runs.trained(config, before=after_step(faults))
        assert "could not be written: rank 0: " in said and told in said
        assert "; of the checkpoints before, step-000000" in said and (run / "finished.json").is_file()
        assert [event["how"] for event in read_attempts(run) if event["event"] == "ended"] == ["finished"]
        failed = [r["checkpoint_failed"] for r in runs.lines(run / "metrics.jsonl") if "checkpoint_failed" in r]
        assert 3 <= max(failed) <= 5
        assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken")


@pytest.mark.parametrize("way", ["fail", "die"], ids=["read-only", "dead"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_breaks_ends_the_run_after_so_many_failed_saves_and_it_can_go_on(data, tmp_path, way, ranks):
    image = tmp_path / "disk"
    with disks.on_device(image, 32 * disks.MIB) as disk:
        run = image / "run"
        config = config_in(data, tmp_path, run, most_failures=3)
        ended = runs.cpt("train", config, ranks=ranks, before=after_step({13: lambda: getattr(disk, way)()}))
        assert [status for status, _ in ended] == [1] * ranks
        last = ended[0][1].splitlines()[-1]
        assert "3 saves have failed one after another (checkpoint.most_failures)" in last and f"{run}/" in last
        assert ("Read-only file system" if way == "fail" else "Input/output error") in last
        assert last.endswith("Mend the disk, and start the same command again") and "Traceback" not in ended[0][1]
        disk.mend()
        assert saved_in(run) in (5, 10)  # the second one may have been on its way
        assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken", ranks)


def test_a_disk_that_does_not_answer_for_a_while_holds_up_the_run_and_no_more(data, tmp_path):
    with disks.on_device(tmp_path / "disk", 32 * disks.MIB) as disk:
        run = disk.path / "run"
        config = config_in(data, tmp_path, run)
        thaw = f"import time; time.sleep(2); {disks.thawing(disk.path)}"

        def freeze() -> None:
            subprocess.Popen([sys.executable, "-c", thaw])
            disk.freeze()

        said = runs.trained(config, before=after_step({12: freeze}))
        assert " E " not in said
        (slowest,) = [event for event in read_attempts(run) if event["event"] == "ended"]
        assert slowest["how"] == "finished"
        assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken")


def test_steps_go_on_while_a_slow_disk_takes_a_checkpoint(data, tmp_path):
    with disks.on_device(tmp_path / "disk", 32 * disks.MIB) as disk:
        run = disk.path / "run"
        config = config_in(data, tmp_path, run, steps=60, every_tokens=30 * runs.TOKENS_A_STEP)
        with disk.slow(400_000):
            said = runs.trained(config)
        seconds = [float(line.split(" in ")[-1].split()[0]) for line in said.splitlines() if " I saved " in line]
        assert len(seconds) == 2 and min(seconds) > 0.3  # some 150 kB, at 400 kB a second
        lines = runs.lines(run / "metrics.jsonl")
        (told,) = [record for record in lines if "save_seconds" in record]
        assert told["step"] == 31 and told["save_seconds"] < seconds[0] / 2
        assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken")


# ---- folders that go


def remove(folder: Path) -> None:
    """As `rm -rf` does, also while a save writes into it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_checkpoint_folder_that_is_deleted_is_made_again_by_the_next_save(data, tmp_path):
    run = tmp_path / "run"
    config = config_in(data, tmp_path, run)
    faults = {12: lambda: remove(run / "checkpoints"), 18: lambda: os._exit(9)}
    with pytest.raises(AssertionError, match=r"ended with \[9\]"):  # in the background the save may not stand by then
        runs.cpt("train", config, "checkpoint.in_background=false", before=after_step(faults))
    assert saved_in(run) == 15
    assert (
        f"{run}/checkpoints was deleted, and all that was saved: saving anew"
        in (run / "logs" / "rank-00000.log").read_text()
    )
    assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_folder_that_is_deleted_is_made_again_with_all_lines_and_the_run_can_go_on(data, tmp_path, ranks):
    run = tmp_path / "run"
    config = config_in(data, tmp_path, run)
    faults = {12: lambda: remove(run), 17: runs.ask_to_stop}
    ended = runs.cpt("train", config, ranks=ranks, before=after_step(faults))
    assert [status for status, _ in ended] == [143] * ranks
    assert f"{run} was deleted while this run writes to it: it is made again" in ended[0][1]
    assert [record["step"] for record in runs.lines(run / "metrics.jsonl")] == list(range(1, 19))
    assert [event["event"] for event in read_attempts(run)] == ["started", "saved_last", "ended"]
    assert_ends_as_if_unbroken(config, run, tmp_path / "unbroken", ranks)


# ---- corpora that go


def copy_of(data: Path, to: Path) -> Path:
    return Path(shutil.copytree(data, to))


def test_a_shard_that_is_deleted_is_read_to_the_end_and_missed_at_the_next_start(data, tmp_path):
    mine = copy_of(data, tmp_path / "data")
    shard = mine / "prose" / "shard-00000.bin"
    config = config_in(mine, tmp_path, tmp_path / "run")
    faults = {12: lambda: shard.rename(tmp_path / "away.bin"), 17: runs.ask_to_stop}
    ((status, _),) = runs.cpt("train", config, before=after_step(faults))
    assert status == 143 and saved_in(tmp_path / "run") == 18
    ((status, told),) = runs.cpt("train", config)
    assert status == 2
    assert f"cpt train: stages.0.sources.prose: {shard} is missing; {shard.parent}/corpus.json names it" in told
    shutil.rmtree(shard.parent)
    ((status, told),) = runs.cpt("train", config)
    assert status == 2 and f"stages.0.sources.prose: there is no corpus at {shard.parent}: " in told
    shutil.copytree(data / "prose", shard.parent)
    assert_ends_as_if_unbroken(config, tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("file", "ranks"),
    [
        ("shard-00000.bin", 1),
        pytest.param("shard-00000.bin", 2, marks=pytest.mark.long),
        pytest.param("shard-00000.idx", 1, marks=pytest.mark.long),
    ],
)
def test_a_shard_that_is_cut_short_under_the_run_is_named_and_the_run_can_go_on(data, tmp_path, file, ranks):
    mine = copy_of(data, tmp_path / "data")
    shard, run = mine / "prose" / file, tmp_path / "run"
    config = config_in(mine, tmp_path, run, steps=100_000)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    process = runs.start(config, folder=tmp_path, launcher=launcher if ranks > 1 else ())
    runs.wait_for_step(run, 12, process)
    os.truncate(shard, 0)
    assert runs.end(process) == 1
    said = (tmp_path / "out.txt").read_text()
    assert f"{shard}, byte " in said and ": the file was cut short to 0 bytes while it was in use; put it back" in said
    (ended,) = [event for event in read_attempts(run) if event["event"] == "ended"]
    assert ended["how"] == "failed" and ended["reason"].startswith(f"{shard}, byte ") and not ended.get("is_final")
    shutil.copy(data / "prose" / file, shard)
    stood = saved_in(run)
    assert stood >= 10
    (status, told), *_ = runs.cpt("train", config, before=runs.ask_to_stop_at(stood + 3), ranks=ranks)
    assert status == 143 and f"going on from {run}/checkpoints/step-{stood:08d}" in told


@pytest.mark.long
def test_a_disk_that_dies_under_the_corpus_is_named_with_its_file(data, tmp_path):
    with disks.on_device(tmp_path / "disk", 64 * disks.MIB) as disk:
        # So large that what is read ahead is not all of it.
        runs.write_corpus(disk.path / "prose", data / "tokenizer", 8_000_000, 1, 1, (20_000, 60_000))
        for name in ("prose-held-out", "code-held-out"):
            shutil.copytree(data / name, disk.path / name)
        config = config_in(disk.path, tmp_path, tmp_path / "run", steps=4000)
        disk.mend()  # nothing of it is in memory
        process = runs.start(config, folder=tmp_path)
        runs.wait_for_step(tmp_path / "run", 12, process)
        disk.lose()
        assert runs.end(process) == 1
        said = (tmp_path / "out.txt").read_text()
        assert f"{disk.path}/prose/shard-00000." in said and "the file gives input/output errors; put it back" in said
        assert saved_in(tmp_path / "run") >= 10
