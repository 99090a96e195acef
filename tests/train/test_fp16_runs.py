"""`cpt train` in fp16: the same windows in the same order, overflow or not, and a resume that cannot be told."""

from __future__ import annotations

import json

import pytest
from cpt_harness import runs, tiny

from cpt.cli import main
from cpt.methods import reptile

# Far too high at first, and back up every three updates: tries are made again all along.
RESTLESS = "loss_scale={initial: 16777216, growth_steps: 3}"


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    run = tmp_path_factory.mktemp("fp16") / "run"
    words = [base.parent / "base.yaml", f"output={run}", "precision=fp16", RESTLESS]
    runs.trained(*words, before=tiny.let_the_cpu_train_in_fp16)
    return run


def test_the_order_is_that_of_any_other_precision_and_losses_stay_near(base, unbroken):
    assert runs.lines(unbroken / "order.jsonl") == runs.lines(base / "order.jsonl")
    assert main(["verify-order", str(unbroken), str(base)]) == 0
    losses = [[record["loss"] for record in runs.lines(run / "metrics.jsonl")] for run in (unbroken, base)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_every_step_tells_its_scale_and_the_tries_that_overflowed(base, unbroken):
    records = runs.lines(unbroken / "metrics.jsonl")
    assert records[0]["retries"] > 2 and sum(record["retries"] for record in records) > records[0]["retries"]
    assert len({record["loss_scale"] for record in records}) > 1
    assert all(record["skipped"] == 0 for record in records)
    assert "loss_scale" not in runs.lines(base / "metrics.jsonl")[0]


def test_a_run_that_was_stopped_goes_on_to_the_bit(base, unbroken, tmp_path):
    def stop_at(step):
        def patch():
            tiny.let_the_cpu_train_in_fp16()
            runs.ask_to_stop_at(step)()

        return patch

    words = [base.parent / "base.yaml", f"output={tmp_path / 'run'}", "precision=fp16", RESTLESS]
    ((status, told),) = runs.cpt("train", *words, before=stop_at(11))
    assert status == 143, told
    runs.trained(*words, before=tiny.let_the_cpu_train_in_fp16)
    found, expected = runs.story(tmp_path / "run"), runs.story(unbroken)
    found["checkpoints"] = expected["checkpoints"]  # one more, where it was stopped
    runs.assert_same_story(found, expected)


def test_gradients_that_are_never_finite_end_the_run_and_the_windows_are_named(base, tmp_path):
    def poison():
        tiny.let_the_cpu_train_in_fp16()
        reptile.Method.after_forward = lambda method, forward: (
            forward.losses.mean() * 1e30 if forward.progress.step == 6 else None
        )

    run = tmp_path / "run"
    words = [base.parent / "base.yaml", f"output={run}", "precision=fp16", "loss_scale.initial=256"]
    ((status, told),) = runs.cpt("train", *words, before=poison)
    assert status == 1 and "step 7" in told.splitlines()[-1] and "not finite" in told.splitlines()[-1]
    found = json.loads((run / "autopsy" / "step-00000007.json").read_text())
    assert found["step"] == 7 and len(found["windows"]) == runs.WINDOWS


def test_a_device_without_fp16_is_refused_before_anything_is_written(base, tmp_path):
    def forbid():
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: False

    words = [base.parent / "base.yaml", f"output={tmp_path / 'run'}", "precision=fp16"]
    ((status, told),) = runs.cpt("train", *words, before=forbid)
    assert status == 2 and "precision = fp16: DeepSpeed does not train in it on this cpu" in told
    assert not (tmp_path / "run").exists()
