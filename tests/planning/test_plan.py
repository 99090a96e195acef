"""`cpt plan` counts what the run will do, and refuses what cannot work."""

from pathlib import Path

import numpy as np
import pytest

from cpt import schedules
from cpt.cli import main
from cpt.config import Fault, build
from cpt.data.shards import ShardWriter
from cpt.planning.plan import plan_lines
from cpt.progress import Progress
from cpt.run import read_run


@pytest.fixture
def config(tmp_path):
    with ShardWriter(tmp_path / "text", 64) as writer:
        for _ in range(10):
            writer.add_document(np.arange(60) % 64)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output: {tmp_path}/run\n"
        "model: {name: llama, vocabulary: 64, width: 16, layers: 1, heads: 2}\n"
        "sequence_length: 8\nbatch: {windows: 4}\n"
        "stages:\n"
        f"  - {{name: one, tokens: 300, sources: {{text: {{corpus: {tmp_path}/text}}}},"
        " schedule: {name: cosine, peak: 1e-3}}\n"
    )
    return str(file)


def test_a_stage_is_rounded_up_to_whole_steps(config):
    text = "\n".join(plan_lines(read_run([config]), num_ranks=2))
    assert "10 steps, 320 tokens" in text
    assert "4 windows of 8 = 32 tokens; on 2 rank(s) 1 micro-batch(es) of 2" in text


def test_epochs_are_told_by_source(config):
    (line,) = [line for line in plan_lines(read_run([config]), 1) if line.startswith("  text")]
    assert line.split()[1:4] == ["320", "100.0%", "0.54"]  # 40 of the 74 windows of 600 tokens


def test_a_batch_that_cannot_be_cut_is_refused_with_values_that_would_do(config):
    with pytest.raises(Fault, match="batch.windows = 4 cannot be cut over 3 ranks; use 3 or 6"):
        list(plan_lines(read_run([config]), num_ranks=3))


def test_all_that_cannot_work_is_told_with_status_2(config, capsys, tmp_path):
    status = main(["plan", config, "--ranks", "3", f"evaluation.held_out.x={tmp_path}/nowhere"])
    told = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(told) == 2
    assert "held_out.x" in told[1]


@pytest.mark.parametrize(("methods", "size"), [("[]", "72.6 KiB"), ("[{name: reptile}]", "96.8 KiB")])
def test_a_checkpoint_holds_12_bytes_a_parameter_and_4_for_each_copy_of_a_method(config, methods, size):
    # 2 x 64 x 16 embedding and head, 4 x 16 x 16 attention, 3 x 16 x 64 feed-forward, 3 x 16 norms = 6,192
    lines = list(plan_lines(read_run([config, f"methods={methods}"]), 1))
    assert "6,192 parameters" in lines[0]
    assert any(line.startswith("disk") and f"{size} a checkpoint" in line for line in lines)


@pytest.mark.parametrize(
    ("methods", "on_device", "on_host"),
    [
        ("[{name: reptile, momentum: 0.9}]", "methods 24.2 KiB", None),
        ("[{name: reptile, momentum: 0.9, anchor_on: host}]", "methods 0.0 B", "24.2 KiB a rank for what methods keep"),
        ("[{name: distillation}]", "methods 24.2 KiB", None),
        ("[{name: distillation}, {name: reptile, anchor_on: host}]", "methods 24.2 KiB", "12.1 KiB a rank for what"),
    ],
)
def test_what_methods_keep_is_told_by_where_it_lies(config, methods, on_device, on_host):
    """Of 6,192 parameters on 2 ranks at ZeRO 1: fp32 pieces are cut, 12.1 KiB each; a teacher is whole, in bf16."""
    lines = list(plan_lines(read_run([config, f"methods={methods}", "precision=bf16"]), 2))
    (memory,) = [line for line in lines if line.startswith("memory")]
    assert f"{on_device})" in memory
    host = [line for line in lines if line.startswith("host") and "methods" in line]
    assert len(host) == bool(on_host) and all(on_host in line for line in host)


def test_what_checkpoints_take_of_disk_and_memory_is_told(config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3 * 2**20})())
    words = ["checkpoint.keep_every_tokens=100", "checkpoint.temporary_every_minutes=5"]
    told = {line.split()[0]: line for line in plan_lines(read_run([config, *words]), 2) if line}
    assert told["host"] == "host        36.3 KiB a rank for the copy that is written in the background"
    # 2 last ones, 3 multiples of 100 in 320 tokens, a temporary one and the one being written: 7 x 72.6 KiB
    assert told["disk"].endswith(
        "a checkpoint, the last 2 are kept, and 3 for ever, and one temporary; "
        "up to 507.9 KiB with the one being written, 3.0 MiB are free"
    )
    assert "host" not in {
        line.split()[0] for line in plan_lines(read_run([config, "checkpoint.in_background=false"]), 1) if line
    }


def test_tensor_ranks_share_the_parameters_and_leave_the_windows_to_data_ranks(config):
    lines = list(plan_lines(read_run([config, "mesh.tensor=2"]), num_ranks=4))
    text = "\n".join(lines)
    assert "on 4 rank(s) 1 micro-batch(es) of 2" in text
    # Half of the 6,192 but for the norms, 3 x 16, which are whole on each.
    assert "mesh        data 2 x tensor 2, 3,120 parameters on a rank" in lines
    with pytest.raises(Fault, match=r"mesh.tensor = 2 cannot cut 3 ranks; use 1, or start"):
        list(plan_lines(read_run([config, "mesh.tensor=2"]), num_ranks=3))


def test_sequence_ranks_share_windows_and_hold_all_parameters_of_which_zero_cuts_the_state(config):
    lines = list(plan_lines(read_run([config, "mesh.sequence=2"]), num_ranks=4))
    assert "on 4 rank(s) 1 micro-batch(es) of 2" in "\n".join(lines)
    assert "mesh        data 2 x sequence 2, 6,192 parameters on a rank" in lines
    memory = [line for line in lines if line.startswith("memory")]
    assert memory == [line for line in plan_lines(read_run([config]), num_ranks=4) if line.startswith("memory")]


def test_no_ranks_at_all_are_refused(config):
    with pytest.raises(Fault, match="--ranks = 0: at least 1"):
        list(plan_lines(read_run([config]), num_ranks=0))


def test_an_output_that_training_would_refuse_is_refused(config, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(Fault, match="the folder is used, but not by a run"):
        list(plan_lines(read_run([config, f"output={tmp_path}/used"]), num_ranks=1))


def two_stages(config, first: str, second: str) -> list[str]:
    """Words for a run of 160 and then as many tokens again with these schedules."""
    source = f"{{text: {{corpus: {config.removesuffix('/run.yaml')}/text, max_epochs: 9}}}}"
    stages = [
        f"{{name: {name}, tokens: 160, sources: {source}, schedule: {schedule}}}"
        for name, schedule in (("main", first), ("release", second))
    ]
    return [config, f"stages=[{', '.join(stages)}]"]


SCHEDULES = {
    "constant": "peak: 1e-3",
    "linear": "peak: 1e-3",
    "cosine": "peak: 1e-3",
    "rewarm": "peak: 1e-3",
    "infinite": "peak: 1e-3, constant: 5e-4, cooldown: 30%",
    "wsd": "peak: 1e-3, decay: 20%",
    "inverse_sqrt": "peak: 1e-3, warmup: 10%",
    "autoregressive": "peak: 1e-3",
    "branch": "floor: 1e-5",
}


def test_every_schedule_is_known_here():
    folder = Path(schedules.__file__).parent
    assert SCHEDULES.keys() == {file.stem for file in folder.glob("*.py") if not file.name.startswith("_")}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_as_its_rates_say(config, name):
    """A bar for each of 60 places from the first to the last step, the highest one whole."""
    run = read_run(two_stages(config, "{name: constant, peak: 1e-3}", f"{{name: {name}, {SCHEDULES[name]}}}"))
    lines = list(plan_lines(run, 1))
    (number,) = [number for number, line in enumerate(lines) if line.startswith(f"  learning rate ({name})")][-1:]
    schedule = build(run.stages[1].schedule, "Schedule", run.stages[1].total_tokens, 1e-3)
    steps = [run.num_slots(run.stages[1]) * column // 59 for column in range(60)]
    rates = [schedule.rate(Progress(stage=1, stage_tokens=slots * run.sequence_length)) for slots in steps]
    drawn = [" ▁▂▃▄▅▆▇█".index(bar) for bar in lines[number + 1].removeprefix("  ")]
    assert drawn == [round(8 * rate / max(rates)) for rate in rates] and max(drawn) == 8
    assert f"{rates[0]:.2e} first, {max(rates):.2e} highest, {rates[-1]:.2e} last" in lines[number]


def test_a_branch_is_drawn_from_the_rate_of_the_stage_before(config):
    words = two_stages(config, "{name: constant, peak: 1e-3}", "{name: branch, floor: 1e-4, shape: linear}")
    curves = [line for line in plan_lines(read_run(words), 1) if "learning rate" in line]
    assert curves == [
        "  learning rate (constant): 1.00e-03 first, 1.00e-03 highest, 1.00e-03 last",
        "  learning rate (branch): 1.00e-03 first, 1.00e-03 highest, 1.00e-04 last",
    ]


def test_a_batch_that_grows_is_drawn(config):
    words = ["batch={windows: 8, micro_batch: 1}", "stages.0.batch_warmup={windows: 2, tokens: 240, increment: 2}"]
    lines = list(plan_lines(read_run([config, *words]), 1))
    (number,) = [number for number, line in enumerate(lines) if "batch:" in line]
    assert lines[number] == "  batch: 2 windows first, 8 from 240 tokens on"
    assert sorted(set(lines[number + 1].strip())) == ["▂", "▄", "▆", "█"] and len(lines[number + 1]) == 62
    assert not [line for line in plan_lines(read_run([config]), 1) if "batch:" in line]


def test_a_share_of_replay_that_may_rise_is_told(config, tmp_path):
    guard = ["raise_replay={forgetting: {source: text, above: 0.1}}", "evaluation.every_tokens=64"]
    words = [*guard, f"evaluation.held_out.text={tmp_path}/text", "stages.0.replay={share: 5%}"]
    words += [f"stages.0.replay.declared.old.corpus={tmp_path}/text"]
    lines = list(plan_lines(read_run([config, *words]), 1))
    assert "  replay may rise from 5% to 50%, with as many fewer new tokens, while more of text is forgotten" in lines


def test_a_schedule_that_cannot_follow_the_stage_before_is_refused_before_anything_is_written(config, tmp_path):
    words = two_stages(config, "{name: cosine, peak: 1e-3}", "{name: branch, floor: 9e-4}")
    told = (
        "stages.1.schedule.floor = 0.0009: the branch begins at 9.54915e-05, the last rate of the path it leaves, and"
    )
    with pytest.raises(Fault, match=told):
        list(plan_lines(read_run(words), 1))
    assert main(["train", *words]) == 2
    assert not (tmp_path / "run").exists()
