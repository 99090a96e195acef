"""`cpt bench step` steps our engine beside others from the same weights, and tells where the time of a step goes."""

from __future__ import annotations

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from cpt_harness.ranks import in_processes

from cpt import cli
from cpt.benchmarks import machine, step, step_profile, step_turns, step_ways
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.models import MODELS
from cpt.benchmarks.step_process import Failed, StepProcess
from cpt.benchmarks.step_turns import Taken, groups_that_fit
from cpt.benchmarks.step_ways import WAYS, Case
from cpt.models import llama, pythia

# Imported once, here, and not in every forked process: they take seconds.
for _module in ("llama.modeling_llama", "gpt_neox.modeling_gpt_neox"):
    importlib.import_module(f"transformers.models.{_module}")

CPU = torch.device("cpu")
_SECONDS = 240.0
SMALL = {
    "llama": llama.Settings(vocabulary=61, width=24, layers=2, heads=4, kv_heads=2, mlp_width=40),
    "pythia": pythia.Settings(vocabulary=61, width=32, layers=2, heads=4),
}


@pytest.mark.long
def test_transformers_and_ours_make_the_same_steps(monkeypatch):
    def losses() -> list[list[list[float]]]:  # in a process of its own, because it meets itself over gloo
        with machine.alone() as mesh:
            return [_losses(Case(model, 7, 4, 2, "fp32"), mesh) for model in SMALL]

    for name, settings in SMALL.items():
        monkeypatch.setitem(MODELS, name, settings)
    (found,) = in_processes([losses], _SECONDS)
    for theirs, *own in found:
        assert len(set(theirs)) == 3
        for losses_of_ours in own:
            assert losses_of_ours == pytest.approx(theirs, abs=2e-5)


@pytest.mark.skipif(not machine.versions("litgpt"), reason="litgpt is not installed")
def test_litgpt_steps_with_the_same_shapes(monkeypatch):
    def losses() -> list[list[float]]:
        with machine.alone() as mesh:
            steps = [WAYS["litgpt"].make(Case(model, 7, 4, 2, "fp32"), mesh) for model in SMALL]
            return [[make() for _ in range(3)] for make in steps]

    for name, settings in SMALL.items():
        monkeypatch.setitem(MODELS, name, settings)
    (found,) = in_processes([losses], _SECONDS)
    for of_model in found:
        assert of_model[0] == pytest.approx(math.log(61), abs=0.3) and len(set(of_model)) == 3


def _losses(case: Case, mesh) -> list[list[float]]:
    steps = [WAYS[name].make(case, mesh) for name in ("transformers", "ours", "ours, plain twins")]
    return [[make() for _ in range(3)] for make in steps]


@pytest.mark.long
def test_a_profile_tells_the_operations_of_a_step_apart(monkeypatch):
    monkeypatch.setitem(MODELS, "llama", SMALL["llama"])

    def groups() -> dict[str, float]:
        with machine.alone() as mesh:
            return step_profile.profiled(step_ways.PROFILED.make(Case("llama", 7, 4, 2, "fp32"), mesh), CPU)

    (told,) = in_processes([groups], _SECONDS)
    assert set(told["groups"]) >= {
        "attention", "norms", "activations", "head and loss", "optimiser", "matmuls", "rest"
    }  # fmt: skip
    assert all(seconds > 0 for name, seconds in told["groups"].items() if name != "communication")
    assert told["seconds"] > 0


def _event(name, own, around=None, number=-1):
    return SimpleNamespace(
        name=name, self_cpu_time_total=own * 1e6, self_device_time_total=own * 2e6, cpu_parent=around,
        sequence_nr=number, device_type=torch.autograd.DeviceType.CPU,
    )  # fmt: skip


def test_a_backward_node_belongs_to_its_forward_operation():
    norm = _event("cpt:rms_norm", 0)
    node = _event("autograd::engine::evaluate_function: MulBackward0", 1, number=5)
    events = [
        norm,
        _event("aten::mul", 2, norm, number=5),
        node,
        _event("aten::mul", 4, node),
        _event("aten::mm", 8, _event("autograd::engine::evaluate_function: MmBackward0", 0, number=6)),
        _event("c10d::allreduce_", 16),
        _event("aten::add_", 32),
    ]
    by_group = {"norms": 7, "matmuls": 8, "communication": 16, "rest": 32}
    assert step_profile.seconds_by_group(events, is_gpu=False) == by_group
    assert step_profile.seconds_by_group(events, is_gpu=True) == {name: 2 * s for name, s in by_group.items()}


def test_what_limits_a_step_is_its_largest_part():
    told = step_profile.limit({"matmuls": 6.0, "norms": 3.0, "rest": 1.0})
    assert told == "Limited by matmuls (60% of the time); then come norms (30%)."
    told = step_profile.limit({"matmuls": 2.0, step_profile.WAITING: 3.0})
    assert told == "Limited by launches: for 60% of the step nothing runs on the GPU."


def test_a_step_is_whole_micro_batches_of_whole_windows():
    assert step._case("quickstart@128", 4096, "fp32") == Case("quickstart", 128, 32, 32, "fp32")
    assert step._case("pythia-410m@2048", 65536, "bf16") == Case("pythia-410m", 2048, 32, 8, "bf16")
    assert step._case("pythia-410m@4096", 65536, "bf16") == Case("pythia-410m", 4096, 16, 4, "bf16")
    assert step._case("llama-3.2-1b@4096", 65536, "bf16").micro_batch == 2
    assert step._case("llama-3-8b@4096", 65536, "bf16").micro_batch == 1
    assert step._case("llama-3-8b@8192", 100, "bf16") == Case("llama-3-8b", 8192, 1, 1, "bf16")
    assert step._case("pythia-410m@4096", 65536, "bf16").settings.longest_sequence == 4096


def test_speed_and_utilisation_are_those_by_hand():
    case = Case("quickstart", 128, 32, 32, "fp32")
    # 4 layers of (q 128 x 128, k and v 64 x 128, o 128 x 128, 3 x 384 x 128), and the head.
    products = 4 * (128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 384 * 128) + 2048 * 128
    causal, full = (6 * products + factor * 4 * 128 * 128 for factor in (6, 12))
    told = step._told_way("ours", case, Taken([2.0, 1.0, 4.0], [4.0, 4.0, 4.0], 7.5, 2**29), 1e9)
    assert told.tokens_per_second == Spread(2048, 1024, 4096)
    assert told.speedup == Spread(2, 1, 4)
    assert (told.mfu, told.mfu_full) == (pytest.approx(2048 * causal / 1e9), pytest.approx(2048 * full / 1e9))
    assert (told.peak_gib, told.first_loss) == (0.5, 7.5)


def test_ways_share_a_gpu_as_long_as_its_memory_lasts():
    ways = ["transformers", "ours", "ours, plain twins", "ours, compiled blocks"]
    gib = 2**30
    assert groups_that_fit(ways, gib, None) == [ways]
    assert groups_that_fit(ways, 7 * gib, 139 * gib) == [ways]
    assert groups_that_fit(ways, 22 * gib, 100 * gib) == [["transformers", way] for way in ways[1:]]
    assert groups_that_fit(["transformers"], gib, 139 * gib) == [["transformers"]]
    assert groups_that_fit([], gib, None) == []


def test_a_model_that_does_not_fit_is_told_with_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 139 * 2**30))
    monkeypatch.setattr(step, "in_turns", None)
    case = step._case("llama-3-8b@4096", 65536, "bf16")
    result = step._measured_case("8b", case, step.Settings(), torch.device("cuda"), 1e15, float("inf"))
    told = {way.name: way.why_not for way in result.ways}
    assert told["ours"] == "does not fit: its state alone is 135 GiB, the GPU has 139"
    assert told["nanotron"] == "not installed"
    assert result.groups == {}


class _Pretended:
    """Steps in 2 s, or ends at the third word."""

    def __init__(self, way: str, case: Case, device: torch.device) -> None:
        self.way, self.asked = way, 0

    def answer(self) -> dict:
        return {"built": True}

    def ask(self, word: str) -> dict:
        self.asked += 1
        if self.way == "ours" and self.asked == 3:
            raise Failed("CUDA error: out | of memory")
        return {"seconds": 2.0, "loss": 7.0 + self.asked} if word == "step" else {"peak_bytes": 5}

    def close(self) -> None:
        self.asked = None


def test_a_way_that_fails_is_told_and_the_others_step_on(monkeypatch, caplog):
    monkeypatch.setattr(step_turns, "StepProcess", _Pretended)
    case = Case("quickstart", 4, 2, 1, "fp32")
    taken = step_turns.in_turns("it", case, ["transformers", "ours", "ours, plain twins"], 2, CPU)
    assert taken.pop("ours") == Taken([], None, 0.0, 0, "failed: CUDA error: out / of memory")
    assert taken == dict.fromkeys(["transformers", "ours, plain twins"], Taken([2.0, 2.0], [2.0, 2.0], 8.0, 5))
    assert "it, ours: CUDA error: out | of memory" in caplog.messages


def test_a_process_that_ends_says_why_in_its_last_line(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'ValueError: no such thing' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    process = StepProcess("ours", Case("quickstart", 4, 2, 1, "fp32"), CPU)
    for asked in (process.answer, lambda: process.ask("step")):
        with pytest.raises(Failed, match="^ValueError: no such thing$"):
            asked()
    process.close()


def test_what_cannot_be_compared_says_so():
    with pytest.raises(ValueError, match="its models run in its own trainer only"):
        WAYS["nanotron"].make(None, None)


@pytest.mark.long
def test_the_table_tells_of_ways_and_of_what_is_not_installed(tmp_path, capsys):
    words = ["--case", "quickstart@4", "--tokens", "8", "--way", "ours,litgpt", "--repetitions", "1", "--no-profile"]
    document = tmp_path / "speed.md"
    written = ["--device", "cpu", "--json", str(tmp_path / "x.json"), "--markdown", str(document)]
    assert cli.main(["bench", "step", *words, *written]) == 0
    printed = capsys.readouterr().out
    assert "**quickstart@4**: 1,311,872 parameters, fp32, ZeRO 1, a step of 2 windows of 4, 2 at once" in printed
    assert "| litgpt | not installed " in printed.replace("  ", " ").replace("  ", " ")
    (case,) = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert case["ways"][0]["name"] == "ours" and case["ways"][0]["tokens_per_second"]["median"] > 0
    assert case["ways"][0]["speedup"] is None and 7 < case["ways"][0]["first_loss"] < 8.5
    assert (
        document.read_text().startswith("<!-- cpt bench step on cpu: begin -->\n") and "| ours " in document.read_text()
    )


def test_nothing_new_begins_when_the_time_is_over(capsys):
    assert cli.main(["bench", "step", "--minutes", "1e-9", "--device", "cpu"]) == 0
    assert "not measured: the time was over" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(capsys):
    words = ["--case", "pythia-41m@2048,quickstart,quickstart@x", "--way", "hours", "--repetitions", "0"]
    assert cli.main(["bench", "step", *words, "--tokens=-1", "--minutes", "0"]) == 2
    told = capsys.readouterr().err
    for line in (
        "case = pythia-41m@2048: there is no such model; did you mean pythia-410m",
        "case = quickstart: say how long its windows are, such as quickstart@2048",
        "case = quickstart@x: say how long",
        "way = hours: there is none; did you mean ours",
        "repetitions = 0: at least 1",
        "tokens = -1: at least one window",
        "minutes = 0.0: above 0",
    ):
        assert line in told, told
