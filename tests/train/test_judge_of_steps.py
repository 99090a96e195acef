"""What a bad step is, against numbers worked by hand; and settings that make no sense."""

from __future__ import annotations

import json
import math

import pytest

from cpt.config import Fault, read_settings
from cpt.lineage.ledger import Skipped
from cpt.parallel.mesh import ALONE
from cpt.run.bad_steps import Bad, Judge, Settings, center_and_deviation, num_bad_steps

LOSSES = [3.0, 3.2, 2.9, 3.1, 3.4]  # sorted 2.9 3.0 3.1 3.2 3.4; distances from 3.1: 0.2 0.1 0.0 0.1 0.3


def judge(tmp_path, losses=LOSSES, stage="prose", **settings) -> Judge:
    lines = [{"step": n + 1, "stage": stage, "loss": loss, "skipped": 0} for n, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = Judge(Settings(**settings), ALONE, tmp_path / "metrics.jsonl")
    made.recall("prose")
    return made


def test_the_center_and_the_deviation_are_the_medians_worked_by_hand():
    median, deviation = center_and_deviation(LOSSES)
    assert median == 3.1 and deviation == pytest.approx(1.4826 * 0.1)


@pytest.mark.parametrize(
    ("named", "limit"),
    [
        ({"spike_nats": 1.0}, 4.1),
        ({"spike_deviations": 10}, 3.1 + 1.4826),
        ({"spike_nats": 1.0, "spike_deviations": 10}, 3.1 + 1.4826),
        ({"spike_nats": 2.0, "spike_deviations": 10}, 5.1),
    ],
    ids=str,
)
def test_a_spike_is_above_the_median_by_more_than_all_that_is_named(tmp_path, named, limit):
    ours = judge(tmp_path, spike="skip_step", spike_steps=5, **named)
    assert ours.found(limit - 1e-9, 1.0) is None
    bad = ours.found(limit + 1e-6, 1.0)
    assert bad.policy == "skip_step" and "the median of the last 5 steps" in bad.reason


def test_nothing_is_a_spike_until_the_stage_has_made_so_many_steps(tmp_path):
    named = {"spike": "skip_step", "spike_nats": 1.0}
    assert judge(tmp_path, spike_steps=6, **named).found(99.0, 1.0) is None
    assert judge(tmp_path, spike_steps=5, stage="code", **named).found(99.0, 1.0) is None
    assert judge(tmp_path, spike_steps=5, **named).found(99.0, 1.0) is not None


def test_only_the_last_steps_count_whether_they_were_read_or_made(tmp_path):
    named = {"spike": "skip_step", "spike_nats": 1.0, "spike_steps": 3}
    ours = judge(tmp_path, [9.0, 9.0, 9.0], **named)
    for loss in (2.0, 2.1, 2.2):
        assert ours.found(loss, 1.0) is None
        ours.learn(loss)
    read = judge(tmp_path, [9.0, 9.0, 9.0, 2.0, 2.1, 2.2], **named)
    assert ours.found(3.2, 1.0) == read.found(3.2, 1.0) is not None
    assert ours.found(3.0, 1.0) is read.found(3.0, 1.0) is None


def test_skipped_steps_do_not_count(tmp_path):
    lines = [
        {"step": n, "stage": "prose", "loss": loss, "skipped": int(loss is None or loss > 5)}
        for n, loss in enumerate([2.0, None, 2.0, 9.0, 2.0])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = Judge(Settings(spike="stop", spike_nats=1.0, spike_steps=3), ALONE, tmp_path / "metrics.jsonl")
    ours.recall("prose")
    assert ours.found(3.5, 1.0).policy == "stop"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_bad_whatever_a_spike_is(tmp_path, loss, norm):
    ours = judge(tmp_path, nonfinite="rewind", spike="skip_step", spike_nats=1.0, spike_steps=5)
    assert ours.found(loss, norm) == Bad("rewind", f"loss {loss}, gradient norm {norm}: not finite")
    assert ours.before_update(loss, norm) and not ours.before_update(3.0, 1.0)


def test_an_update_that_was_left_out_is_bad_though_its_numbers_are_fine(tmp_path):
    assert judge(tmp_path).found(3.0, 1.0, was_left_out=True).policy == "stop"


def test_where_every_bad_step_ends_the_run_no_update_is_judged_before_it_is_made(tmp_path):
    assert judge(tmp_path, spike="stop", spike_nats=1.0).before_update is None
    assert judge(tmp_path, nonfinite="skip_step").before_update is not None


def test_bad_steps_of_ancestors_and_of_long_ago_do_not_count():
    def found(step: int, **more) -> Skipped:
        return Skipped("prose", 8 * step, 8, step, "loss nan", **more)

    skipped = [found(3), found(10), found(12), found(11, is_inherited=True), Skipped("prose", 0, 4, 12, "beside it")]
    assert num_bad_steps(Settings(), skipped, 20) == 3
    assert num_bad_steps(Settings(within_steps=10), skipped, 20) == 1
    assert num_bad_steps(Settings(within_steps=8), skipped, 20) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"spike": "rewind"}, "spike = rewind: say how far above the last losses a spike stands"),
        ({"spike_nats": 1.0}, "spike_nats with spike = off: nothing looks at it"),
        ({"spike": "stop", "spike_nats": 0.0}, "spike_nats = 0: above 0"),
        ({"spike": "stop", "spike_deviations": -1.0}, "spike_deviations = -1: above 0"),
        ({"spike": "stop", "spike_nats": 1.0, "spike_steps": 2}, "spike_steps = 2: at least 3"),
        ({"nonfinite": "rewind", "skip_before": -1}, "skip_before = -1: at least 0"),
        ({"nonfinite": "skip_step", "skip_before": 1}, "only a rewind comes again to what lies before the bad step"),
        ({"at_most": 0}, "at_most = 0: at least 1"),
        ({"within_steps": 0}, "within_steps = 0: at least 1"),
    ],
    ids=str,
)
def test_nonsense_is_told(settings, told):
    with pytest.raises(Fault) as fault:
        read_settings(Settings, settings)
    assert any(told in line for line in fault.value.lines), fault.value.lines
