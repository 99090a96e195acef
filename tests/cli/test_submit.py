"""`cpt submit` checks before it submits, copies what the job runs from, and calls sbatch; here a stand-in for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from cpt_harness import runs

from cpt.cli import main
from cpt.cli.submit import add_arguments
from cpt.huggingface.architectures.llama import config_of
from cpt.models.llama import Settings
from cpt.observe.attempts import read_attempts
from cpt.run import read_run


@pytest.fixture
def config(data, tmp_path) -> Path:
    plain = runs.settings(data, tmp_path / "a run", [runs.stage(data, "prose", 3)])
    plain["batch"]["micro_batch"] = 1
    return runs.write_settings(tmp_path / "run.yaml", plain)


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """A stand-in that gives numbers from 41 on, and a file with the words it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    called = folder / "called"
    (folder / "sbatch").write_text(
        f'#!/bin/sh\necho "$*" >>"{called}"\necho "$((40 + $(wc -l <"{called}"))) ; cluster" | tr -d " "\n'
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return called


def submit(config: Path, *words: object) -> int:
    return main(["submit", str(config), *map(str, words)])


def test_a_dry_run_prints_the_file_and_leaves_nothing(config, tmp_path, capsys):
    assert submit(config, "--nodes", 2, "--tasks-per-node", 2, "--dry-run") == 0
    told = capsys.readouterr().out
    assert told.startswith("#!/bin/bash\n#SBATCH --job-name=") and "launcher/supervise.py" in told
    assert not (tmp_path / "a run").exists()


def test_a_submission_is_noted_with_the_jobs_number(config, sbatch, tmp_path, capsys):
    assert submit(config) == 0
    (event,) = read_attempts(tmp_path / "a run")
    assert (event["event"], event["job"]) == ("submitted", "41")
    assert "job 41" in capsys.readouterr().out
    script = tmp_path / "a run" / "snapshot" / "0001" / "job.sbatch"
    assert sbatch.read_text() == f"--parsable {script}\n" and script.is_file()


def test_the_job_runs_from_a_copy_that_trains_as_the_settings_say(config, sbatch, tmp_path):
    assert submit(config, "seed=7") == 0
    place = tmp_path / "a run" / "snapshot" / "0001"
    config.unlink()
    # The shell drops the last word, which is the code that is tested here.
    launcher = ["sh", "-c", '"$1" "$2" "$3"', "sh", sys.executable, place / "launcher/run.py", place / "config.yaml"]
    process = runs.start(folder=tmp_path, launcher=launcher, num_cores=1)
    assert runs.end(process) == 0
    assert (tmp_path / "a run" / "finished.json").is_file()
    assert read_run([str(tmp_path / "a run" / "run.yaml")]).seed == 7


def test_the_copy_holds_the_code_and_nothing_that_was_compiled(config, sbatch, tmp_path):
    assert submit(config) == 0
    place = tmp_path / "a run" / "snapshot" / "0001"
    for name in ("cpt/train.py", "launcher/supervise.py", "launcher/cpt_launcher/templates/job.sbatch",
                 "kernels/cpt_kernels/switch.py"):  # fmt: skip
        assert (place / name).read_bytes() == (runs.ROOT / name).read_bytes()
    assert not list(place.rglob("__pycache__"))


def test_a_second_submission_leaves_the_first_ones_copy_as_it_is(config, sbatch, tmp_path):
    assert submit(config) == 0 and submit(config, "log.every_steps=5") == 0
    first, second = sorted((tmp_path / "a run" / "snapshot").iterdir())
    assert yaml.safe_load((first / "config.yaml").read_text())["log"]["every_steps"] == 1
    assert yaml.safe_load((second / "config.yaml").read_text())["log"]["every_steps"] == 5


def test_a_chain_is_submitted_job_by_job_under_a_name_of_its_own(config, sbatch, tmp_path):
    assert submit(config, "--repeat", "chain", "--jobs", 3) == 0
    assert len(sbatch.read_text().splitlines()) == 3
    assert [event["chain"] for event in read_attempts(tmp_path / "a run")] == [["41", "42", "43"]] * 3
    text = (tmp_path / "a run" / "snapshot" / "0001" / "job.sbatch").read_text()
    assert '--job-name="a run-' in text and '--job-name="a run"' not in text


def refused(config: Path, capsys, *words: object) -> str:
    assert submit(config, *words) == 2
    return capsys.readouterr().err


def test_without_sbatch_the_fault_says_so_and_nothing_is_left_of_the_copy(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch: there is no such command here" in refused(config, capsys)
    assert list((tmp_path / "a run" / "snapshot").iterdir()) == []


def test_what_sbatch_refuses_is_told_in_its_words(config, sbatch, tmp_path, capsys):
    (sbatch.parent / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n"
    )
    assert "error: invalid partition specified: x" in refused(config, capsys, "--partition", "x")
    assert read_attempts(tmp_path / "a run") == []


def test_a_wrong_setting_is_told_before_anything_is_submitted(config, sbatch, capsys):
    assert "sed: there is no such setting" in refused(config, capsys, "sed=1")
    assert not sbatch.exists()


def test_every_number_of_nodes_that_the_job_may_get_must_be_able_to_train_it(config, sbatch, capsys):
    told = refused(config, capsys, "--nodes", 4, "--min-nodes", 2)
    assert "on 3 node(s), 3 rank(s): batch.windows = 8" in told and "on 2 node(s)" not in told
    assert not sbatch.exists()


def test_data_that_are_not_there_are_told_before_the_job_waits_for_hours(config, sbatch, capsys):
    assert "/nowhere" in refused(config, capsys, "stages.0.sources.prose.corpus=/nowhere")


def test_a_finished_run_and_a_folder_of_something_else_are_refused(config, sbatch, tmp_path, capsys):
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "notes.txt").touch()
    assert "used, but not by a run" in refused(config, capsys)
    (tmp_path / "a run" / "notes.txt").rename(tmp_path / "a run" / "run.yaml")
    (tmp_path / "a run" / "finished.json").touch()
    assert "this run is finished" in refused(config, capsys)


@pytest.fixture
def begun(data, tmp_path) -> Path:
    """The settings of a run that was stopped long before its end; it lies in `a run`."""
    plain = runs.settings(data, tmp_path / "a run", [runs.stage(data, "prose", 40)])
    config = runs.write_settings(tmp_path / "begun.yaml", plain)
    runs.cpt("train", config, before=runs.ask_to_stop_at(2))
    return config


def child_of(parent: Path, data: Path, tmp_path: Path, **more: object) -> Path:
    plain = runs.settings(data, tmp_path / "child", [runs.stage(data, "prose", 3)], **more)
    del plain["model"]
    plain["parent"] = {"run": str(parent)}
    return runs.write_settings(tmp_path / "child.yaml", plain)


def test_a_resume_with_settings_of_another_run_is_refused_before_anything_is_submitted(begun, sbatch, tmp_path, capsys):
    told = refused(begun, capsys, "seed=77")
    assert "holds another run; name another output, or set these back:" in told and "seed is 77" in told
    assert not sbatch.exists() and not (tmp_path / "a run" / "snapshot").exists()
    assert submit(begun, "log.every_steps=5") == 0


def test_a_parent_without_the_checkpoint_that_is_named_is_refused(base, data, sbatch, tmp_path, capsys):
    config = child_of(base, data, tmp_path)
    assert "there is no checkpoint at step 7; there are: " in refused(config, capsys, "parent.at=7")
    assert submit(config, "--dry-run") == 0 and not sbatch.exists()


def test_a_parent_that_is_not_finished_is_refused(begun, data, sbatch, tmp_path, capsys):
    assert "is not finished" in refused(child_of(tmp_path / "a run", data, tmp_path), capsys)
    assert not sbatch.exists()


def test_a_folder_of_weights_without_weights_is_refused(data, sbatch, tmp_path, capsys):
    folder = tmp_path / "llama"
    folder.mkdir()
    model = Settings(**{key: value for key, value in runs.MODEL.items() if key != "name"})
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 3)], model={"from": str(folder)})
    assert f"{folder} holds no weights" in refused(runs.write_settings(tmp_path / "weights.yaml", plain), capsys)
    assert not sbatch.exists()


def test_the_branch_of_a_plan_that_holds_another_run_is_refused(data, sbatch, tmp_path, capsys):
    config = plan_of(data, tmp_path)
    (tmp_path / "plan" / "version-1").mkdir(parents=True)
    (tmp_path / "plan" / "version-1" / "run.yaml").write_text("seed: 12345\n")
    assert "plan/version-1 holds another run" in refused(config, capsys)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_run_that_a_job_is_at_work_on_is_refused(config, sbatch, tmp_path, capsys, state):
    assert submit(config) == 0
    scontrol = sbatch.parent / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho JobId=41 JobState={state}\n")
    scontrol.chmod(0o755)
    assert f"job 41 is {state} for this run; scancel 41 first" in refused(config, capsys)


def plan_of(data: Path, tmp_path: Path) -> Path:
    plain = runs.settings(data, tmp_path / "plan", [])
    del plain["stages"]
    source = {"sources": {"prose": {"corpus": str(data / "prose")}}, "tokens": 20 * runs.TOKENS_A_STEP}
    plain |= {"main": {"peak": 1e-3}, "versions": [{"name": name, **source} for name in ("one", "two")]}
    plain["versions"][1]["sources"] = {"code": {"corpus": str(data / "code")}}
    return runs.write_settings(tmp_path / "plan.yaml", plain)


def test_a_version_plan_is_submitted_as_one_job_for_all_its_runs(data, sbatch, tmp_path):
    config = plan_of(data, tmp_path)
    assert submit(config) == 0
    text = (tmp_path / "plan" / "main" / "snapshot" / "0001" / "job.sbatch").read_text()
    assert text.count(f"--run {tmp_path}/plan/") == 2 and f"run={tmp_path}/plan/main\n" in text
    saved = yaml.safe_load((tmp_path / "plan" / "main" / "snapshot" / "0001" / "config.yaml").read_text())
    assert [version["name"] for version in saved["versions"]] == ["one", "two"]


def test_every_option_says_what_it_is_for():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help and action.dest != "settings"] == []
