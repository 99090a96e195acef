"""A file with `versions:` becomes a main path and branches, trained in turn, stopped anywhere and taken up again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from cpt_harness import runs
from cpt_harness.ranks import RankError

from cpt.cli import main
from cpt.config import Fault
from cpt.lineage.tree import read_lineage
from cpt.observe.journal import Journal
from cpt.versions import read_versions

STEP = runs.TOKENS_A_STEP
PARTS = ("main", "version-1", "version-2", "version-3")


def plan_settings(data: Path, output: Path, **more: Any) -> Path:
    """Prose for 6 steps, code for 5 and a fifth of replay, prose again for 4. Branches: 3 of 6, 3 of 6, 2 of 4."""
    plain = runs.settings(data, output, [])
    del plain["stages"]
    versions = [
        {"name": "first", "tokens": 6 * STEP, "sources": {"prose": {"corpus": str(data / "prose")}}},
        {
            "name": "second", "tokens": 5 * STEP, "sources": {"code": {"corpus": str(data / "code")}},
            "replay": {"share": 0.16, "accounting": "adds_to_new"},
        },
        {
            "name": "third", "tokens": 4 * STEP, "replay": {"share": 0.25},
            "sources": {name: {"corpus": str(data / name)} for name in ("prose", "code")},
        },
    ]  # fmt: skip
    plan = {
        "main": {"peak": 5e-3, "warmup": 2 * STEP},
        "branch": {"share": 0.5, "floor": 1e-4, "shape": "linear"},
        "versions": versions,
        "checkpoint": {"keep_last": 1},
    }
    path = output.parent / f"{output.name}.yaml"
    path.parent.mkdir(exist_ok=True, parents=True)
    return runs.write_settings(path, {**plain, **plan, **more})


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    return plan_settings(data, tmp_path_factory.mktemp("plan") / "versions")


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """The folder of a plan that ran in one go."""
    runs.trained(config)
    return config.parent / "versions"


def num_steps(run: Path) -> int:
    return runs.lines(run / "metrics.jsonl")[-1]["step"]


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in runs.lines(run / "metrics.jsonl")]


def assert_same(found: Path, expected: Path) -> None:
    """Every run of both plans is the same to the bit; they began in folders of other names."""
    for part in PARTS:
        one, other = runs.story(found / part), runs.story(expected / part)
        runs.assert_same_story({**one, "checkpoints": other["checkpoints"]}, other)


# ---- what is trained


def test_the_path_ends_where_the_last_branch_leaves_it_and_each_branch_has_its_share(whole):
    assert [num_steps(whole / part) for part in PARTS] == [6 + 6 + 2, 3, 3, 2]
    left = [read_lineage(whole / part).parent for part in PARTS[1:]]
    assert [parent.step for parent in left] == [3, 9, 14]
    assert {parent.run for parent in left} == {(whole / "main").resolve()}


def test_the_path_stays_at_its_peak_and_branches_go_down_from_there(whole):
    assert rates(whole / "main") == [0.0, 2.5e-3, *[5e-3] * 12]
    for part, steps in (("version-1", 3), ("version-2", 3), ("version-3", 2)):
        assert rates(whole / part) == pytest.approx([5e-3 - 4.9e-3 * step / steps for step in range(steps)])


def test_a_branch_sees_what_the_path_sees_over_the_rest_of_its_version(whole):
    """The first update is the same, so are the losses before and after it, on the same windows."""
    on_the_path = runs.lines(whole / "main" / "metrics.jsonl")
    for part, left in (("version-1", 3), ("version-2", 9)):
        here = runs.lines(whole / part / "metrics.jsonl")
        assert [line["loss"] for line in here[:2]] == [line["loss"] for line in on_the_path[left : left + 2]]
        ended, there = (runs.story(run)["ledger"] for run in (whole / part, whole / "main"))
        consumed = {entry["source"]: entry["windows_consumed"] for entry in ended["sources"]}
        assert all(entry["windows_consumed"] >= consumed.get(entry["source"], 0) for entry in there["sources"])


def test_checkpoints_that_only_branches_needed_are_gone_when_they_are_done(whole):
    assert [path.name for path in sorted((whole / "main" / "checkpoints").glob("*step-*"))] == ["step-00000014"]


def test_what_the_path_keeps_for_ever_stays(data, tmp_path):
    kept = {"keep_last": 1, "keep_at_tokens": [9 * STEP]}
    runs.trained(plan_settings(data, tmp_path / "versions", checkpoint=kept))
    folders = sorted((tmp_path / "versions" / "main" / "checkpoints").glob("*step-*"))
    assert [path.name for path in folders] == ["step-00000009", "step-00000014"]


def test_two_ranks_make_the_same_runs(data, whole, tmp_path):
    runs.trained(plan_settings(data, tmp_path / "versions"), ranks=2)
    for part in PARTS:
        one, other = (runs.lines(folder / part / "order.jsonl")[-1] for folder in (tmp_path / "versions", whole))
        assert one == other


def test_a_plan_that_is_done_is_left_alone(config, whole):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    told = runs.trained(config)
    assert told.count("is finished; nothing to do") == 4
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


# ---- stopped and taken up again


def at_step_of(run: str, step: int, number: int):
    """For `before`: the signal comes right after that step of the run in the folder of that name."""

    def patch() -> None:
        make, tell, of_run = Journal.__init__, Journal.step, {}

        def make_and_note(journal: Journal, folder: Path, *arguments: Any) -> None:
            of_run[id(journal)] = folder.name
            make(journal, folder, *arguments)

        def tell_and_ask(journal: Journal, record: dict[str, Any], num_tokens: int) -> None:
            tell(journal, record, num_tokens)
            if record["step"] == step and of_run[id(journal)] == run:
                os.kill(os.getpid(), number)

        Journal.__init__, Journal.step = make_and_note, tell_and_ask

    return patch


@pytest.mark.parametrize(("run", "step"), [("main", 1), ("main", 7), ("main", 14), ("version-1", 1), ("version-2", 3)])
def test_stopped_in_any_run_it_goes_on_to_the_same_end(data, whole, tmp_path, run, step):
    """Also in a run's last step, after which the next run must not begin."""
    config = plan_settings(data, tmp_path / "versions")
    ((status, _),) = runs.cpt("train", config, before=at_step_of(run, step, 15))
    assert status == 128 + 15
    begun = {path.name for path in (tmp_path / "versions").iterdir()}
    assert begun == set(PARTS[: PARTS.index(run) + 1])
    runs.trained(config)
    assert_same(tmp_path / "versions", whole)


@pytest.mark.parametrize(("run", "step"), [("main", 11), ("version-2", 2)])
def test_killed_in_any_run_it_goes_on_to_the_same_end(data, whole, tmp_path, run, step):
    config = plan_settings(data, tmp_path / "versions")
    with pytest.raises(RankError):
        runs.cpt("train", config, before=at_step_of(run, step, 9))
    assert num_steps(tmp_path / "versions" / run) == step
    runs.trained(config)
    assert_same(tmp_path / "versions", whole)


def test_a_stop_that_reached_one_rank_in_a_runs_last_step_stops_all(data, tmp_path):
    config = plan_settings(data, tmp_path / "versions")

    def on_one() -> None:
        if os.environ["RANK"] == "1":
            at_step_of("main", 14, 15)()

    statuses = [status for status, _ in runs.cpt("train", config, before=on_one, ranks=2)]
    assert statuses == [128 + 15, 128 + 15]
    assert not (tmp_path / "versions" / "version-1").exists()


# ---- what is told, and what cannot work


def test_the_plan_tells_where_branches_leave_and_what_it_costs(data, tmp_path, capsys):
    assert main(["plan", str(plan_settings(data, tmp_path / "versions"))]) == 0
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert told[:9] == [
        "version tokens branch leaves at step its tokens its learning rate",
        "first 576 3 288 5.00e-03 to 1.73e-03",
        "second 576 9 288 5.00e-03 to 1.73e-03",
        "third 384 14 192 5.00e-03 to 2.55e-03",
        "",
        "cost of 3 releases tokens of scratch of plainly on",
        "main path and branches 2,112 65% 138%",
        "each version from scratch 3,264 100% 212%",
        "plainly on, one after another 1,536 47% 100%",
    ]
    assert told[10].startswith(f"main path: {tmp_path}/versions/main")
    assert "the run 14 steps, 1,344 tokens" in told
    assert any("and 2 for ever" in line for line in told)
    assert not (tmp_path / "versions").exists()


def test_four_equal_versions_and_six_tenths_cost_58_percent(data, tmp_path, capsys):
    version = yaml.safe_load(plan_settings(data, tmp_path / "versions").read_text())["versions"][0]
    versions = [{**version, "name": f"year {number}", "tokens": 10 * STEP} for number in range(4)]
    assert main(["plan", str(plan_settings(data, tmp_path / "versions", versions=versions)), "branch.share=0.6"]) == 0
    assert "58%" in capsys.readouterr().out


def refused(data: Path, tmp_path: Path, *words: str, **more: Any) -> list[str]:
    with pytest.raises(Fault) as caught:
        read_versions([str(plan_settings(data, tmp_path / "versions", **more)), *words])
    return list(caught.value.lines)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"branch": {"share": 1}}, "branch.share = 1: above 0 and below 1"),
        ({"branch": {"flor": 1e-5}}, "branch.flor: there is no such setting; did you mean floor?"),
        ({"branch": {"floor": -1}}, "branch.floor = -1.0: at least 0"),
        ({"branch": 0.6}, "branch = 0.6: expected 'key: value' lines"),
        ({"branch": {"floor": 1}}, "branch.floor = 1: the branch begins at 0.005, the last rate of the path"),
        ({"main": {}}, "main.peak is not set; it has no default"),
        ({"stages": []}, "stages: a plan has versions in their place; leave one of them out"),
        ({"versions": []}, "versions = []: expected a list, each with name, tokens and sources"),
        ({"versions": [{"schedule": "constant"}]}, "versions.0.schedule: the plan sets it; leave it out"),
        ({"versions": [{"name": "a"}]}, "versions.0.tokens is not set; it has no default"),
    ],
)
def test_what_cannot_work_is_told_in_the_words_of_the_file(data, tmp_path, more, told):
    assert any(line.startswith(told) for line in refused(data, tmp_path, **more)), refused(data, tmp_path, **more)


def test_a_version_of_one_step_is_refused(data, tmp_path):
    version = {"name": "a", "tokens": STEP, "sources": {"prose": {"corpus": str(data / "prose")}}}
    told = "versions.0: 1 step(s) in all, of which the branch takes 1 and the path none before it; give it more tokens"
    assert refused(data, tmp_path, versions=[version])[0].startswith(told)


def growing(data: Path, tokens: int | str) -> dict[str, Any]:
    """A version of 10 whole batches of 8 windows, which begins with 4 windows a step for so many tokens."""
    batch = {"windows": 4, "tokens": tokens}
    sources = {"prose": {"corpus": str(data / "prose")}}
    return {"name": f"grows over {tokens}", "tokens": 10 * STEP, "sources": sources, "batch_warmup": batch}


def test_a_batch_may_grow_before_the_branch_leaves(data, tmp_path):
    """6 steps of half a batch, then 7; the branch takes the last 5."""
    versions = [{**growing(data, 3 * STEP), "name": name} for name in ("a", "b")]
    plan = read_versions([str(plan_settings(data, tmp_path / "versions", versions=versions))])
    assert [release.place.step for release in plan.releases] == [8, 13 + 8]
    assert [release.place.tokens for release in plan.releases] == [5 * STEP, 15 * STEP]
    assert plan.main.total_tokens == 15 * STEP
    assert [release.run.total_tokens for release in plan.releases] == [5 * STEP] * 2


def test_a_batch_that_grows_where_it_cannot_is_refused(data, tmp_path):
    told = "versions.0.batch_warmup: the batch still grows when the branch leaves; make it shorter"
    assert refused(data, tmp_path, versions=[growing(data, 6 * STEP)]) == [told]
    told = "versions.0.batch_warmup: the path ends within this version; write its length in tokens"
    assert refused(data, tmp_path, versions=[growing(data, "40%")]) == [told]


def test_the_folder_of_a_run_is_refused(data, base, tmp_path):
    assert f"output = {base}: this is a run's own folder; name one for the plan" in refused(
        data, tmp_path, f"output={base}"
    )


def test_a_plan_needs_an_output(data, tmp_path):
    plain = yaml.safe_load(plan_settings(data, tmp_path / "versions").read_text())
    del plain["output"]
    with pytest.raises(Fault, match="output is not set"):
        read_versions([str(runs.write_settings(tmp_path / "plan.yaml", plain))])


def test_a_file_of_one_run_is_no_plan(data, tmp_path):
    plain = runs.settings(data, tmp_path / "run", [runs.stage(data, "prose", 3)])
    assert read_versions([str(runs.write_settings(tmp_path / "run.yaml", plain))]) is None
