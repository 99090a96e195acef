"""`cpt bench kernels` times what is right, tells what is wrong or absent, and holds all of it against its floor."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch

from cpt import cli
from cpt.benchmarks import calls, kernels, machine, ways
from cpt.benchmarks.measure import Spread
from cpt.benchmarks.models import MODELS
from cpt.benchmarks.operations import Peer, Size, Work, update
from cpt.benchmarks.ways import Measured, operation_named
from cpt.config import names_of_choices, read_mapping, read_settings
from cpt.config.choices import settings_of_choice
from cpt.models import llama, pythia
from cpt_kernels import adamw

OPERATIONS = names_of_choices("cpt.benchmarks.operations")
LLAMA = llama.Settings(vocabulary=11, width=12, layers=2, heads=3, kv_heads=1, mlp_width=20)
PYTHIA = pythia.Settings(vocabulary=11, width=24, layers=2, heads=3)
SIZE = Size.of_model("tiny", LLAMA, 2, 5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short turns, small buffers and small models; nothing is compiled, no peer that is installed takes minutes."""
    monkeypatch.setattr(calls, "_SECONDS_A_TURN", 0.0001)
    monkeypatch.setattr("cpt.benchmarks.measure._wait_for_quiet", lambda: None)
    monkeypatch.setattr(calls, "bandwidth", lambda *_: Spread(1e9, 1e9, 1e9))
    monkeypatch.setattr(calls, "matmul_rate", lambda *_: Spread(1e10, 1e10, 1e10))
    monkeypatch.setattr(ways, "_BYTES_OF_INPUTS", 1 << 12)
    monkeypatch.setattr(kernels, "_MICRO_BATCHES", {"small-llama": (2, 5), "small-pythia": (2, 5)})
    monkeypatch.setitem(MODELS, "small-llama", LLAMA)
    monkeypatch.setitem(MODELS, "small-pythia", PYTHIA)


def floors(operation: str, size: Size = SIZE) -> list[tuple[float, float]]:
    """(bytes, FLOPs) of forward and backward in fp32."""
    return [(one.num_bytes, one.flops) for one in operation_named(operation).file.work(size, torch.float32) if one]


# By hand for 2 windows of 5: 10 tokens, width 12 in 3 heads of 4, 1 of keys, feed-forward 20, 11 words, 4 bytes each.
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("rms_norm", [(4 * (120 + 120 + 12), 0), (4 * (120 + 120 + 120 + 12 + 12), 0)]),
        ("swiglu", [(4 * (200 + 200 + 200), 0), (4 * 5 * 200, 0)]),
        # 10 tokens of 3 + 1 heads are turned whole; cosines and sines of 5 positions and 2 pairs.
        ("rotary", [(4 * (160 + 160 + 20), 0), (4 * (160 + 160 + 20), 0)]),
        # Scores: 2 windows of half of 5 x 5 in 3 heads, each of 4 multiplications and 4 additions a product.
        ("attention", [(4 * (120 + 40 + 40 + 120), 2 * 75 * 8), (4 * (4 * 120 + 4 * 40), 5 * 75 * 8)]),
        ("cross_entropy", [(4 * 2 * 110, 2 * 10 * 11 * 12), (4 * 3 * 110, 2 * 2 * 10 * 11 * 12)]),
        ("add_rms_norm", [(4 * (4 * 120 + 12), 0), (4 * (4 * 120 + 12 + 12), 0)]),
        ("adamw", [(28 * LLAMA.num_parameters, 0)]),
        # The norm reads a gradient of 4 bytes, the update again, with 3 states of 4 read and written, and 2 of a copy.
        ("update", [((4 + 4 + 3 * 8 + 2) * LLAMA.num_parameters, 0)]),
        ("update_with_pull", [((4 + 4 + 3 * 8 + 2 + 8) * LLAMA.num_parameters, 0)]),
    ],
)
def test_the_floor_of_each_operation_of_llama_is_that_by_hand(operation, expected):
    assert floors(operation) == expected


def test_the_floor_of_each_operation_of_pythia_is_that_by_hand():
    size = Size.of_model("tiny", PYTHIA, 2, 5)  # width 24 in 3 heads of 8, of which 2 entries are turned
    assert floors("layer_norm", size) == [(4 * (240 + 240 + 48), 0), (4 * (3 * 240 + 72), 0)]
    assert floors("add_layer_norm", size) == [(4 * (4 * 240 + 48), 0), (4 * (4 * 240 + 72), 0)]
    assert floors("gelu", size) == [(4 * 2 * 960, 0), (4 * 3 * 960, 0)]
    assert floors("rotary", size)[0] == (4 * (120 + 120 + 10), 0)


def test_within_documents_the_floor_follows_the_squares_of_their_lengths():
    operation = operation_named("attention_within_documents")
    lengths = operation.file.documents_of(SIZE).cu_seqlens.diff().tolist()
    assert sum(lengths) == 10 and len(lengths) > 2
    across, within = floors("attention"), floors("attention_within_documents")
    assert within[0][1] == across[0][1] * sum(length**2 for length in lengths) / 50
    assert within[0][0] == across[0][0]


def test_every_operation_has_a_floor_by_hand_here():
    llama_s = {"rms_norm", "add_rms_norm", "swiglu", "rotary", "attention", "cross_entropy"}
    updates, pythia_s = {"adamw", "update", "update_with_pull"}, {"layer_norm", "add_layer_norm", "gelu"}
    assert set(OPERATIONS) == llama_s | updates | pythia_s | {"attention_within_documents"}


def test_what_overlaps_takes_the_longer_of_both_and_what_does_not_their_sum():
    assert Work(2e6, 3e9).microseconds(1e9, 1e12) == 3000
    assert Work(2e6, 1e9).microseconds(1e9, 1e12) == 2000
    assert Work(2e6, 3e9, overlaps=False).microseconds(1e9, 1e12) == 5000


def test_all_operations_are_timed_and_the_table_tells_of_them(tmp_path, capsys):
    told = tmp_path / "x.json"
    words = ["--no-compile", "--repetitions", "2", "--device", "cpu", "--json", str(told)]
    assert cli.main(["bench", "kernels", *words]) == 0
    printed = capsys.readouterr().out
    assert "**small-llama**: 2 windows of 5, width 12, 3 heads of 4 (1 of keys), feed-forward 20" in printed
    assert "medians (smallest to largest) of 2 alternating repetitions" in printed
    result = json.loads(told.read_text())
    assert {one["operation"] for one in result["operations"]} == set(OPERATIONS)
    for one in result["operations"]:
        assert any("(serves)" in way["name"] for way in one["ways"])
        for way in one["ways"]:
            if way["why_not"] and not way["name"].startswith(("plain", "torch")):
                continue
            assert way["why_not"] is None and way["error"] < 1e-4, way
            assert 0 < way["forward"]["smallest"] <= way["forward"]["median"] <= way["forward"]["largest"]
            assert (way["whole"] is None) == (one["operation"] in ("adamw", "update", "update_with_pull"))
        assert one["ways"][0]["forward_speedup"] == {"median": 1, "smallest": 1, "largest": 1}
    assert len({one["shape"] for one in result["operations"]}) == 2


def test_on_a_cpu_each_shape_that_is_named_has_all_of_its_operations():
    def measured(*shapes: str) -> list[tuple[str, str]]:
        settings = kernels.Settings(("rotary", "gelu"), shapes, "cpu", repetitions=1, compile=False, peers=False)
        return [(one.operation, one.shape) for one in kernels.compare(settings).operations]

    assert measured() == [("rotary", "small-llama"), ("gelu", "small-pythia")]
    assert measured("small-llama", "small-pythia") == [
        ("rotary", "small-llama"), ("rotary", "small-pythia"), ("gelu", "small-pythia")
    ]  # fmt: skip


def test_a_peer_that_is_not_installed_is_told(monkeypatch, capsys):
    monkeypatch.setattr(machine, "version", _only("torch"))
    words = ["--no-compile", "--repetitions", "1", "--device", "cpu", "--operation", "adamw,rms_norm"]
    assert cli.main(["bench", "kernels", *words]) == 0
    printed = capsys.readouterr().out
    assert "Not measured, not installed: DeepSpeed CPU Adam." in printed
    assert "Not measured, needs a GPU: apex FusedAdam, Transformer Engine FusedAdam, DeepSpeed FusedAdam" in printed


def _only(*installed: str):
    def version(package: str) -> str:
        if package not in installed:
            raise machine.PackageNotFoundError(package)
        return "1"

    return version


def test_on_a_gpu_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(machine, "version", _only("torch"))
    peers = operation_named("attention").file.PEERS
    whys = {name: ways.why_absent(peer, torch.device("cuda"), False) for name, peer in peers.items()}
    assert whys["flash-attn 2"] == "not installed" and whys["FlashAttention in torch"] is None
    assert ways.why_absent(Peer("torch", dict, "cpu"), torch.device("cuda"), False) == "for CPUs"


def test_what_would_have_to_be_built_is_told_and_built_where_that_is_asked_for(monkeypatch, tmp_path):
    peer = operation_named("adamw").file.PEERS["DeepSpeed CPU Adam"]
    monkeypatch.setattr(ways.cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    cpu = torch.device("cpu")
    assert ways.why_absent(peer, cpu, False) == "not built (with --build it is, in minutes)"
    assert ways.why_absent(peer, cpu, True) is None
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "py311_cpu" / "cpu_adam" / "cpu_adam.so").touch()
    assert ways.why_absent(peer, cpu, False) is None


def _measured(monkeypatch, twins: dict, operation: str = "swiglu") -> dict[str, Measured]:
    """The ways of an operation with these further twins."""
    asked = operation_named(operation)
    monkeypatch.setattr(asked.file.KERNEL, "TWINS", {**asked.file.KERNEL.TWINS, **twins})
    cpu = torch.device("cpu")
    found, _ = ways.ways_of(asked, cpu, False, False, False)
    return {one.name: one for one in ways.measured_ways(asked, found, SIZE, torch.float32, cpu, 1)}


def test_a_new_twin_is_measured_without_a_change_here(monkeypatch):
    new = _measured(monkeypatch, {"new": lambda gate, up: torch.nn.functional.silu(gate).mul(up)})["new"]
    assert new.why_not is None and new.forward.median > 0 and new.whole_speedup.median > 0


def test_a_way_that_is_wrong_is_shown_as_wrong_and_not_timed(monkeypatch):
    measured = _measured(
        monkeypatch,
        {
            "off": lambda gate, up: torch.nn.functional.silu(gate) * up * 1.001,
            "empty": lambda gate, up: (gate * up).fill_(math.nan) + gate + up,
            "right forward, wrong backward": lambda gate, up: torch.nn.functional.silu(gate) * (2 * up - up.detach()),
        },
    )
    for name, one in list(measured.items())[1:]:
        assert one.why_not == "WRONG, not timed" and one.forward is None and one.whole is None, name
    assert measured["off"].error == pytest.approx(1e-3, rel=0.01)
    result = kernels.OperationResult("swiglu", "tiny", 1.0, 3.0, list(measured.values()))
    (row,) = [line for line in kernels._table_of([result]) if "| off " in line]
    assert [cell.strip() for cell in row.strip("| ").split("|")][:2] == ["off", "WRONG, not timed"]
    assert row.rstrip(" |").endswith("1e-03")


def test_an_optimiser_that_forgets_its_moments_is_wrong(monkeypatch):
    def forgetful(groups, rate, betas, epsilon):
        return torch.optim.AdamW(groups, lr=rate, betas=(0.0, betas[1]), eps=epsilon)

    assert _measured(monkeypatch, {"forgetful": forgetful}, "adamw")["forgetful"].why_not == "WRONG, not timed"


@pytest.mark.parametrize("operation", ["update", "update_with_pull"])
def test_the_one_kernel_makes_the_same_update_as_deepspeeds_passes(operation, monkeypatch):
    if not ways.language.IS_INTERPRETED and not torch.cuda.is_available():
        pytest.skip("Triton's kernels run in its interpreter or on a GPU")
    monkeypatch.setattr(ways, "_why_not", lambda *_: None)
    measured = _measured(monkeypatch, {}, operation)
    assert measured["triton in one kernel"].why_not is None, measured["triton in one kernel"]


def test_an_update_that_does_not_clip_is_wrong(monkeypatch):
    unclipped = functools.partial(update.in_passes, adamw.plain, clip=1e9)
    # Adam's step does not depend on the scale of all gradients, but on how that changes from one to the next.
    assert _measured(monkeypatch, {"unclipped": unclipped}, "update")["unclipped"].why_not == "WRONG, not timed"


def test_a_way_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    def fails(gate, up):
        raise RuntimeError("needs a GPU\nand more")

    measured = _measured(monkeypatch, {"fails": fails})
    assert measured.pop("fails") == Measured("fails", "RuntimeError: needs a GPU")
    assert all(one.forward for one in measured.values())


def test_triton_is_not_timed_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(ways.language, "IS_INTERPRETED", True)
    asked = operation_named("swiglu")
    monkeypatch.setattr(asked.file.KERNEL, "TWINS", {**asked.file.KERNEL.TWINS, "triton": None})
    found, missing = ways.ways_of(asked, torch.device("cpu"), False, False, False)
    assert "triton" not in [way.name for way in found]
    assert missing["swiglu triton"] == "Triton's interpreter tells no times"


def test_shares_of_the_floor_are_taken_of_the_median():
    forward, whole = (Spread(200, 100, 300), Spread(2, 1, 3)), (Spread(1600, 1, 2000), Spread(4, 4, 4))
    way = Measured("x", None, 1e-7, *forward, *whole, extra_bytes=2**20)
    result = kernels.OperationResult("rms_norm", "tiny", 50.0, 400.0, [way])
    assert kernels._row(result, way) == (
        "x", "200 (100 to 300)", "25%", "2 (1 to 3)", "1,600 (1 to 2,000)", "25%", "4 (4 to 4)", "1", "1e-07",
    )  # fmt: skip


def test_nothing_new_begins_when_the_time_is_over(capsys):
    words = ["--no-compile", "--device", "cpu", "--operation", "swiglu", "--minutes", "1e-9"]
    assert cli.main(["bench", "kernels", *words]) == 0
    assert "not measured: the time was over" in capsys.readouterr().out


def test_the_table_takes_the_place_of_the_old_one_in_a_document(tmp_path, capsys):
    document = tmp_path / "README.md"
    marks = [f"<!-- cpt bench kernels on cpu: {end} -->" for end in ("begin", "end")]
    document.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    words = ["--no-compile", "--device", "cpu", "--operation", "swiglu", "--repetitions", "1"]
    assert cli.main(["bench", "kernels", *words, "--markdown", str(document)]) == 0
    text = document.read_text()
    assert "old" not in text and text.startswith(f"before\n{marks[0]}\n") and text.endswith(f"\n{marks[1]}\nafter\n")
    assert "**swiglu**" in text
    assert cli.main(["bench", "kernels", *words, "--markdown", str(tmp_path / "new.md")]) == 0
    assert "**swiglu**" in (tmp_path / "new.md").read_text()


def test_a_document_without_the_marks_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "compare", None)
    (tmp_path / "x.md").write_text("nothing\n")
    assert cli.main(["bench", "kernels", "--device", "cpu", "--markdown", str(tmp_path / "x.md")]) == 2
    assert "has no part between the lines <!-- cpt bench kernels on cpu: begin -->" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(capsys):
    words = ["--operation", "swigle", "--shape", "round", "--repetitions", "0", "--minutes", "0", "--device", "cuda"]
    assert cli.main(["bench", "kernels", *words]) == 2
    told = capsys.readouterr().err
    for line in (
        "operation = swigle: there is none; did you mean swiglu",
        "shape = round: there is none",
        "repetitions = 0: at least 1",
        "minutes = 0.0: above 0",
    ):
        assert line in told, told
    if not torch.cuda.is_available():
        assert "device = cuda: torch finds no GPU here; leave it out" in told


def test_on_a_gpu_calls_take_turns_and_each_begins_with_an_empty_cache(monkeypatch):
    told, clock = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("clock")
            self.at = next(clock)

        def elapsed_time(self, end) -> float:
            return float(end.at - self.at)

        def synchronize(self) -> None: ...

    class Flushed:
        def zero_(self) -> None:
            told.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flushed())
    monkeypatch.setattr(calls, "_CALLS_A_TURN", 1)
    taken = calls.microseconds_of([lambda: told.append("a"), lambda: told.append("b")], torch.device("cuda"), 2)
    assert taken == [[1000.0, 1000.0], [1000.0, 1000.0]]
    a, b = ["flush", "clock", "a", "clock"], ["flush", "clock", "b", "clock"]
    assert told == [*a, *b] * 3  # the first to see how long they take


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, f"configs/models/{name}.yaml") for name in ("pythia-410m", "llama-3.2-1b", "llama-3-8b")]
    + [("quickstart", "configs/quickstart/base.yaml")],
)
def test_a_known_model_is_as_its_config_says(name, file):
    plain = dict(read_mapping([str(Path(__file__).parents[2] / file)])["model"])
    assert read_settings(settings_of_choice("cpt.models", plain.pop("name")), plain) == MODELS[name]


def test_bandwidth_and_matmul_rate_are_positive(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(calls, "_SECONDS_A_TURN", 0.0001)
    cpu = torch.device("cpu")
    assert calls.matmul_rate(cpu, torch.float32, 1).median > 1e8
    assert calls.bandwidth(cpu, 1).median > 1e7
    assert calls.peak_extra_bytes(dict, cpu) is None
