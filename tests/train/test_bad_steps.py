"""Bad steps are dealt with as the settings say: what comes of it is a run that never saw their windows, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cpt_harness import runs, tiny
from cpt_harness.poison import all_windows, bad_windows, call_all, poison

from cpt.checkpoint import RunFolder
from cpt.lineage.ledger import Ledger, Skipped
from cpt.observe.attempts import read_attempts
from cpt.observe.journal import Journal
from cpt.run import autopsy, rewinding
from cpt.run.passed_over import read_passed_over, write_passed_over

NUM_STEPS = 12
BAD_STEP = 8
FIRST = (BAD_STEP - 1) * runs.WINDOWS  # its first window
POLICIES = ["skip_step", "rewind"]
# (ranks, words): every ZeRO stage, a pipeline, low precision.
MESHES = [
    (1, ["zero=0"]),
    (1, ["zero=1", "precision=bf16"]),
    *((2, [f"zero={zero}"]) for zero in (0, 2)),
    (2, ["zero=3", "precision=bf16"]),
    (2, ["zero=1", "mesh.pipeline=2"]),
    (2, ["zero=2", "precision=fp16", "loss_scale={initial: 16777216, growth_steps: 3}"]),
]
QUICK = (2, ["zero=1"])


def config_of(data: Path, output: Path, steps: int = NUM_STEPS, **more) -> Path:
    """Prose, saved every 5 steps and scored every 7, with Reptile every 3 updates."""
    stages = more.pop("stages", None) or [runs.stage(data, "prose", steps)]
    plain = runs.settings(data, output, stages, **{"methods": [{"name": "reptile", "every": 3}], **more})
    return runs.write_settings(output.parent / f"{output.name}.yaml", plain)


@pytest.fixture
def config(data, tmp_path) -> Path:
    return config_of(data, tmp_path / "run")


def never_seen(data: Path, output: Path, *skipped: Skipped, words=(), ranks: int = 1, **more) -> Path:
    """A finished run that was told before its third step what to pass over."""
    config = config_of(data, output, **more)
    runs.cpt("train", config, *words, ranks=ranks, before=fitting(words, runs.ask_to_stop_at(1)))
    write_passed_over(RunFolder(output), skipped)
    runs.trained(config, *words, ranks=ranks, before=fitting(words))
    return output


def fitting(words: Sequence[str], *patches: Callable[[], None]) -> Callable[[], None]:
    """For `before`: calls the patches, on a CPU that trains in fp16 if the words ask for it."""
    also = [tiny.let_the_cpu_train_in_fp16] if "precision=fp16" in words else []
    return lambda: call_all([*also, *patches])


def skipped_of(run: Path) -> list[Skipped]:
    return [Skipped.from_json(one) for one in json.loads((run / "ledger.json").read_text()).get("skipped", [])]


def windows_of_autopsy(run: Path, step: int = BAD_STEP) -> list[dict]:
    return json.loads((run / "autopsy" / f"step-{step:08d}.json").read_text())["windows"]


def assert_same_end(found: Path, expected: Path) -> None:
    """Weights, moments, methods, ledger, order and scores from the bad step on."""
    here, there = runs.story(found), runs.story(expected)
    for kind, tensors in there["tensors"].items():
        for name, values in tensors.items():
            assert torch.equal(here["tensors"][kind][name], values), (kind, name)
    assert here["ledger"] == there["ledger"] and here["state"] == there["state"]
    assert here["order"] == there["order"] and here["scores"] == there["scores"]
    late = [[line for line in story["metrics"] if line["step"] > BAD_STEP] for story in (here, there)]
    assert late[0] == late[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mesh", [QUICK, *(pytest.param(m, marks=pytest.mark.long) for m in MESHES)], ids=str)
def test_the_run_ends_as_one_that_never_saw_the_windows(data, config, tmp_path, mesh, policy):
    ranks, words = mesh
    bad = fitting(words, poison(bad_windows(config, BAD_STEP)))
    told = runs.trained(config, *words, f"bad_steps.nonfinite={policy}", ranks=ranks, before=bad)
    assert f"step {BAD_STEP}: loss nan" in told and "(1 of 10)" in told
    run = tmp_path / "run"
    (skipped,) = skipped_of(run)
    assert (skipped.stage, skipped.window, skipped.number, skipped.step) == ("prose", FIRST, runs.WINDOWS, BAD_STEP)
    assert_same_end(run, never_seen(data, tmp_path / "told", skipped, words=words, ranks=ranks))
    lines = runs.lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["skipped"] for line in lines] == [int(line["step"] == BAD_STEP) for line in lines]
    assert [line.get("bad_steps", 0) for line in lines[BAD_STEP - 2 :]] == [int(policy == "rewind"), 1, 1, 1, 1, 1]
    assert "loss nan" in lines[BAD_STEP - 1]["why_skipped"] and lines[BAD_STEP - 1]["loss"] is None
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    is_nan = [window["loss"] == "nan" for window in windows_of_autopsy(run)]
    of_step = torch.from_numpy(all_windows(config)[FIRST : FIRST + runs.WINDOWS, :-1])
    assert is_nan == (of_step == bad_windows(config, BAD_STEP)).all(dim=1).tolist() and any(is_nan)


def test_a_rewind_is_told_and_the_windows_are_there_to_be_read(config, tmp_path):
    runs.trained(config, "bad_steps.nonfinite=rewind", before=poison(bad_windows(config, BAD_STEP)))
    run = tmp_path / "run"
    (event,) = [event for event in read_attempts(run) if event["event"] == "rewound"]
    assert (event["step_from"], event["step_to"]) == (BAD_STEP, 5) and event["seconds"] > 0 and "nan" in event["reason"]
    autopsy = json.loads((run / "autopsy" / "step-00000008.json").read_text())
    assert (autopsy["step"], autopsy["loss"], autopsy["stage"], autopsy["policy"]) == (8, "nan", "prose", "rewind")
    assert autopsy["loss_by_source"] == {"prose": "nan"} and Path(autopsy["corpora"]["prose"]).is_dir()
    windows = autopsy["windows"]
    assert [window["slot"] for window in windows] == list(range(FIRST, FIRST + runs.WINDOWS))
    assert all(window["source"] == "prose" and window["epoch"] == 0 and window["text"] for window in windows)
    losses = [window["loss"] for window in windows]
    assert losses.count("nan") == 1 and all(2 < loss < 5 for loss in losses if loss != "nan")


def test_of_a_large_step_the_text_is_that_of_the_windows_with_the_highest_losses(config, tmp_path, monkeypatch):
    read = {}
    for most in (64, 3):
        run = tmp_path / f"most-{most}"
        monkeypatch.setattr(autopsy, "_MOST_TEXTS", most)
        bad = poison(bad_windows(config, 2))
        assert runs.cpt("train", config, f"output={run}", before=bad)[0][0] == 1
        read[most] = windows_of_autopsy(run, 2)
    shown = {index for index, window in enumerate(read[3]) if "text" in window}
    losses = [math.inf if window["loss"] == "nan" else window["loss"] for window in read[64]]
    assert shown == set(sorted(range(runs.WINDOWS), key=losses.__getitem__)[-3:]) and losses.count(math.inf) == 1
    assert len(read[3]) == len(read[64]) == runs.WINDOWS
    assert all(read[3][index] == read[64][index] for index in shown)


def test_where_all_losses_are_as_bad_the_text_is_that_of_windows_from_all_over_the_step(monkeypatch):
    monkeypatch.setattr(autopsy, "_MOST_TEXTS", 3)
    assert autopsy._worst([math.nan] * 8) == [0, 3, 7]
    assert autopsy._worst([1.0, 9.0, math.nan, 2.0, math.inf]) == [1, 2, 4]


@pytest.mark.parametrize(("policy", "status"), [("stop", 1), ("rewind", 0)])
def test_an_autopsy_that_cannot_be_written_holds_nobody_up(config, tmp_path, policy, status):
    run, bad = tmp_path / "run", bad_windows(config, BAD_STEP)
    runs.cpt("train", config, before=runs.ask_to_stop_at(1))
    (run / "autopsy").touch()
    ended = runs.cpt("train", config, f"bad_steps.nonfinite={policy}", ranks=2, before=poison(bad))
    assert [found for found, _ in ended] == [status] * 2, ended
    assert "autopsy/step-00000008.json cannot be written" in ended[0][1]
    assert "'source': 'prose', 'first_token': " in ended[0][1]


@pytest.mark.parametrize("policy", POLICIES)
def test_with_policies_and_nothing_bad_not_a_bit_changes(base, tmp_path, policy):
    words = [f"output={tmp_path / 'run'}", f"bad_steps.nonfinite={policy}", f"bad_steps.spike={policy}"]
    runs.trained(base.parent / "base.yaml", *words, "bad_steps.spike_nats=50", "bad_steps.spike_steps=5")
    runs.assert_same_story(runs.story(tmp_path / "run"), runs.story(base))


def end_in(owner: object, name: str):
    """For `poison`: the process ends as if it were killed, instead of calling this."""

    def patch() -> None:
        def die(*arguments, **named):
            raise KeyboardInterrupt

        setattr(owner, name, die)

    return patch


@pytest.mark.parametrize("place", [(RunFolder, "forget_after"), (rewinding, "write_passed_over"), (Journal, "rewind")],
                         ids=lambda place: place[1])  # fmt: skip
def test_killed_within_a_rewind_it_comes_to_the_same_end(data, config, tmp_path, place):
    bad = bad_windows(config, BAD_STEP)
    words = [config, "bad_steps.nonfinite=rewind"]
    ((status, _),) = runs.cpt("train", *words, before=poison(bad, torch.nan, end_in(*place)))
    assert status != 0 and not (tmp_path / "run" / "finished.json").exists()
    runs.trained(*words, before=poison(bad))
    assert_same_end(tmp_path / "run", never_seen(data, tmp_path / "told", *skipped_of(tmp_path / "run")))


def test_stopped_on_its_way_again_and_taken_up_on_other_ranks_it_passes_over_the_same(data, config, tmp_path):
    bad, run = bad_windows(config, BAD_STEP), tmp_path / "run"
    words = [config, "bad_steps.nonfinite=rewind"]
    runs.cpt("train", *words, before=poison(bad, torch.nan, end_in(Journal, "rewind")))
    ((status, _),) = runs.cpt("train", *words, before=poison(bad, torch.nan, runs.ask_to_stop_at(6)))
    assert status == 143 and RunFolder(run).latest().state["progress"]["step"] == 7
    runs.trained(*words, ranks=2, before=poison(bad))
    expected = never_seen(data, tmp_path / "told", *skipped_of(run))
    assert runs.cpt("verify-order", run, expected)[0][0] == 0
    assert json.loads((run / "ledger.json").read_text()) == json.loads((expected / "ledger.json").read_text())


def test_what_was_passed_over_makes_another_order(config, base, tmp_path):
    runs.trained(config, "bad_steps.nonfinite=skip_step", before=poison(bad_windows(config, BAD_STEP)))
    ((status, _),) = runs.cpt("verify-order", tmp_path / "run", base)
    assert status == 1


def test_steps_before_the_bad_one_are_passed_over_too(data, config, tmp_path):
    words = ["bad_steps.nonfinite=rewind", "bad_steps.skip_before=4"]
    told = runs.trained(config, *words, "checkpoint.keep_last=9", before=poison(bad_windows(config, BAD_STEP)))
    run = tmp_path / "run"
    (skipped,) = skipped_of(run)
    assert (skipped.window, skipped.number) == (3 * runs.WINDOWS, 5 * runs.WINDOWS) and "back to step 0" in told
    assert [line["step"] for line in runs.lines(run / "metrics.jsonl") if line["skipped"]] == [4, 5, 6, 7, 8]
    assert_same_end(run, never_seen(data, tmp_path / "told", skipped))


def test_where_no_checkpoint_is_old_enough_as_many_as_can_be_are(config, tmp_path):
    words = ["bad_steps.nonfinite=rewind", "bad_steps.skip_before=6", "checkpoint.keep_last=1"]
    told = runs.trained(config, *words, before=poison(bad_windows(config, BAD_STEP)))
    (skipped,) = skipped_of(tmp_path / "run")
    assert (skipped.window, skipped.stop) == (5 * runs.WINDOWS, FIRST + runs.WINDOWS) and "back to step 5" in told


@pytest.mark.parametrize("start", [[], ["optimizer_state=warm(2)"]], ids=str)
def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(data, tmp_path, start):
    # Each keeps something from the first step on, which the beginning knows nothing of.
    methods = {"methods": [{"name": "reptile", "every": 3}, {"name": "l2_to_start"}, {"name": "distillation"}]}
    config = config_of(data, tmp_path / "run", **methods)
    told = runs.trained(config, *start, "bad_steps.nonfinite=rewind", before=poison(bad_windows(config, 4)))
    assert "back to step 0" in told
    (skipped,) = skipped_of(tmp_path / "run")
    assert (skipped.window, skipped.step) == (3 * runs.WINDOWS, 4)
    assert_same_end(tmp_path / "run", never_seen(data, tmp_path / "told", skipped, words=start, **methods))


def test_a_child_killed_on_its_way_to_its_beginning_begins_there(data, base, tmp_path):
    parent = {"parent": {"run": str(base)}, "optimizer_state": "keep"}
    config, words = config_of(data, tmp_path / "run", **parent), ["bad_steps.nonfinite=rewind"]
    bad = bad_windows(config, 3, ledger=Ledger.from_json(json.loads((base / "ledger.json").read_text())))
    ((status, _),) = runs.cpt("train", config, *words, before=poison(bad, torch.nan, end_in(Journal, "rewind")))
    assert status != 0
    assert "step-00000000: step 0" in runs.trained(config, *words, before=poison(bad))
    (skipped,) = skipped_of(tmp_path / "run")
    assert (skipped.window, skipped.step) == (2 * runs.WINDOWS, 3)
    assert_same_end(tmp_path / "run", never_seen(data, tmp_path / "told", skipped, **parent))


def test_a_damaged_checkpoint_is_passed_by(data, config, tmp_path):
    run = tmp_path / "run"

    def damage() -> None:
        find = rewinding.find_checkpoint

        def damaged(checkpoints, **named):
            (checkpoints / "step-00000010" / "index.json").write_text("{")
            return find(checkpoints, **named)

        rewinding.find_checkpoint = damaged

    bad = poison(bad_windows(config, 12), torch.nan, damage)
    told = runs.trained(config, "bad_steps.nonfinite=rewind", before=bad)
    assert "step-00000010/index.json" in told and "back to step 5" in told
    assert_same_end(run, never_seen(data, tmp_path / "told", *skipped_of(run)))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_bad_step_too_many_ends_the_run(config, tmp_path, policy):
    bad = poison(bad_windows(config, BAD_STEP, BAD_STEP + 2))
    words = [f"bad_steps.nonfinite={policy}", "bad_steps.at_most=1"]
    ended = runs.cpt("train", config, *words, ranks=2, before=bad)
    assert [status for status, _ in ended] == [1, 1]
    assert "step 10: loss nan" in ended[0][1] and "one more than bad_steps.at_most = 1" in ended[0][1]
    last = read_attempts(tmp_path / "run")[-1]
    assert (last["event"], last["how"], last["is_final"]) == ("ended", "failed", True)
    assert json.loads((tmp_path / "run" / "autopsy" / "step-00000010.json").read_text())["policy"] == "stop"


def test_bad_steps_further_apart_than_the_limit_says_do_not_end_it(config):
    bad = poison(bad_windows(config, BAD_STEP, BAD_STEP + 2))
    words = ["bad_steps.nonfinite=skip_step", "bad_steps.at_most=1", "bad_steps.within_steps=1"]
    assert runs.trained(config, *words, before=bad).count("its update was left out (1 of 1)") == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_spike_is_dealt_with_before_it_is_learned_from(data, config, tmp_path, policy):
    words = [f"bad_steps.spike={policy}", "bad_steps.spike_nats=1.0", "bad_steps.spike_steps=3"]
    told = runs.trained(config, *words, before=poison(bad_windows(config, BAD_STEP), factor=9.0))
    assert f"step {BAD_STEP}: loss " in told and "is a spike" in told
    run = tmp_path / "run"
    (skipped,) = skipped_of(run)
    assert skipped.window == FIRST and "the median of the last 3 steps" in skipped.reason
    assert_same_end(run, never_seen(data, tmp_path / "told", skipped))


def test_a_spike_can_end_the_run(config, tmp_path):
    words = ["bad_steps.spike=stop", "bad_steps.spike_nats=1.0", "bad_steps.spike_steps=3"]
    ((status, told),) = runs.cpt("train", config, *words, before=poison(bad_windows(config, BAD_STEP), factor=9.0))
    assert status == 1 and "is a spike" in told.splitlines()[-1]
    assert RunFolder(tmp_path / "run").latest().state["progress"]["step"] == 5


def test_losses_before_a_stop_count_for_spikes_after_it(config, tmp_path):
    words = [config, "bad_steps.spike=skip_step", "bad_steps.spike_nats=1.0", "bad_steps.spike_steps=6"]
    bad = bad_windows(config, BAD_STEP)
    runs.cpt("train", *words, before=poison(bad, 9.0, runs.ask_to_stop_at(6)))
    runs.trained(*words, before=poison(bad, 9.0))
    assert [one.window for one in skipped_of(tmp_path / "run")] == [FIRST]


def test_a_child_that_goes_on_with_the_stage_from_before_passes_over_the_same(data, config, tmp_path):
    words = ["bad_steps.nonfinite=rewind", "checkpoint.keep_last=9"]
    runs.trained(config, *words, before=poison(bad_windows(config, BAD_STEP)))
    words = ["--at", 5, "--tokens", 5 * runs.TOKENS_A_STEP, "--output", tmp_path / "branch", "--same-windows"]
    ((status, told),) = runs.cpt("branch", tmp_path / "run", *words)
    assert status == 0, told
    runs.trained(tmp_path / "branch" / "run.yaml")
    lines = runs.lines(tmp_path / "branch" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0] and "bad_steps" not in lines[-1]
    (skipped,) = skipped_of(tmp_path / "branch")
    assert skipped.is_inherited and skipped.window == FIRST


def test_in_steps_of_another_size_whole_steps_are_passed_over_and_said_to_be(config, tmp_path):
    run, bad = tmp_path / "run", bad_windows(config, BAD_STEP)
    words = [config, "bad_steps.nonfinite=rewind"]
    runs.cpt("train", *words, before=poison(bad, torch.nan, end_in(Journal, "rewind")))
    told = runs.trained(*words, "batch.windows=12", before=poison(bad))
    # Steps of 12 from window 40 on: those of 52 and 64 share windows with 56 to 63.
    assert "windows are passed over that share it with those of step 8" in told
    assert sorted((one.window, one.stop) for one in skipped_of(run)) == [(52, 56), (56, 64)]
    entry = json.loads((run / "ledger.json").read_text())["sources"][0]
    assert sum(b - a for epoch in entry["skipped"] for a, b in epoch) == 12


def test_at_the_beginning_of_a_stage_it_goes_back_to_the_end_of_the_one_before_and_no_further(data, tmp_path):
    code = runs.stage(data, "code", 6)
    config = config_of(data, tmp_path / "run", stages=[runs.stage(data, "prose", 6), code])
    words = ["bad_steps.nonfinite=rewind", "bad_steps.skip_before=4"]
    told = runs.trained(config, *words, before=poison(bad_windows(config, 1, stage=1)))
    (skipped,) = skipped_of(tmp_path / "run")
    assert (skipped.stage, skipped.window, skipped.number, skipped.step) == ("code", 0, runs.WINDOWS, 7)
    assert "back to step 6" in told and read_passed_over(tmp_path / "run") == (skipped,)


def test_the_ledger_command_tells_what_was_skipped(config, tmp_path, capsys):
    from cpt.cli import main

    runs.trained(config, "bad_steps.nonfinite=skip_step", before=poison(bad_windows(config, BAD_STEP)))
    assert main(["lineage", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "8 windows of stage prose from window 56 on: nothing is learned from them: loss nan" in told
