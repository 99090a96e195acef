"""The sum of all settings: read from files and words, written in full, inherited by children, compared on resuming."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from cpt.config import Fault, as_mapping, read_mapping, read_settings, write_yaml
from cpt.progress import Progress
from cpt.run import Run, differences, in_full, read_run

SMALLEST = """
output: runs/a
model: {name: llama, vocabulary: 100}
stages:
- name: prose
  tokens: 10K
  sources: {prose: {corpus: data/prose}}
  schedule: {name: constant, peak: 3e-4}
"""

FULL = """
output: runs/full
seed: 7
parent: {run: PARENT, at: 500}
optimizer_state: keep
gate: {windows: 2, tolerance: 0.1, largest_jump: 3}
model: {name: llama, vocabulary: 100, width: 64, layers: 2, heads: 4, kv_heads: 2, rope_base: 5e5, tied: true}
sequence_length: 64
attention: across_documents
batch: {windows: 24, micro_batch: 3}
precision: fp32
optimizer: {beta1: 0.8, beta2: 0.9, epsilon: 1e-6, weight_decay: 0, clip: 0.5}
zero: 3
mesh: {timeout_seconds: 60}
kernels: {all: plain}
methods: [{name: reptile, every: 5, step_size: 0.5}]
evaluation: {held_out: {no: data/no, 5: data/five}, windows: 0, every_tokens: 1M, micro_batch: 2}
stop_if: {forgetting: {source: no, above: 0.1}}
raise_replay: {forgetting: [], gain: 2, at_most: 60%}
checkpoint: {every_tokens: 2M, keep_last: 3, keep_every_tokens: 10M, temporary_every_minutes: 7.5, in_background: false}
log: {every_steps: 10, peak_tflops: 989}
deepspeed: {zero_optimization: {reduce_bucket_size: 5e8, stage: auto}, timers: {x: 2024-01-05}}
stages:
- name: first
  tokens: 300M
  sources: {no: {corpus: data/no, share: 1/3}, de: {corpus: ~/data/de, share: 66.5%}}
  replay:
    share: 25%
    accounting: adds_to_new
    from: [pile, prose]
    declared: {pile: {corpus: /data/pile, tokens: 300B}}
    capacity: 1M
    ramp: {start: 1/2, tokens: 30M}
  schedule: {name: rewarm, peak: 3e-4, floor: 3e-5, warmup: 1%}
- name: second
  tokens: 1.5B
  sources: {no: {corpus: data/no}}
  schedule: {name: cosine, peak: 3e-4, warmup: 1M}
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def full(file) -> Run:
    file(SMALLEST, "parent/run.yaml")
    path = file(FULL)
    return read_run([file(FULL.replace("PARENT", str(Path(path).parent / "parent")))])


def faults_of(*words: str) -> list[str]:
    with pytest.raises(Fault) as caught:
        read_run(words)
    return list(caught.value.lines)


def test_a_run_needs_few_words_and_the_rest_is_told_by_defaults(file):
    run = read_run([file(SMALLEST)])
    assert run.output == Path("runs/a")
    assert run.stages[0].tokens == 10_000
    assert run.stages[0].schedule.peak == 3e-4
    assert (run.seed, run.sequence_length, run.precision, run.zero) == (1, 2048, "bf16", 1)


def test_everything_that_can_be_set_is_read(full):
    assert full.parent.at == "500"
    assert full.model.rope_base == 5e5
    assert full.stages[0].sources["no"].share == Fraction(1, 3)
    assert full.stages[0].sources["de"].corpus == Path.home() / "data/de"
    assert full.stages[0].replay.share == Fraction(1, 4)
    assert full.methods[0].step_size == 0.5
    assert full.evaluation.held_out == {"no": Path("data/no"), "5": Path("data/five")}
    assert full.deepspeed["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert full.deepspeed["timers"] == {"x": "2024-01-05"}


def test_every_setting_of_the_full_run_differs_from_its_default(full):
    """So that a setting that were lost on the way through a file would be missed below."""
    alike = [f.name for f in dataclasses.fields(Run) if f.default is not dataclasses.MISSING
             and getattr(full, f.name) == f.default]  # fmt: skip
    assert alike == ["weights", "growth"]  # a run with a parent has none


def test_a_run_survives_the_way_through_a_mapping(full):
    assert read_settings(Run, as_mapping(full)) == full


def test_a_run_survives_the_way_through_its_run_yaml(full, tmp_path):
    write_yaml(full, tmp_path / "again.yaml", "Every setting.")
    assert read_run([str(tmp_path / "again.yaml")]) == full
    assert as_mapping(full) == read_mapping([str(tmp_path / "again.yaml")])
    assert as_mapping(full) == yaml.safe_load((tmp_path / "again.yaml").read_text())


def test_run_yaml_says_every_setting(full, file, tmp_path):
    write_yaml(read_run([file(SMALLEST)]), tmp_path / "again.yaml")
    assert set(read_mapping([str(tmp_path / "again.yaml")])) == {field.name for field in dataclasses.fields(Run)}


def test_words_override_the_file_into_lists_too(file):
    run = read_run([file(SMALLEST), "seed=2", "stages.0.tokens=5", "stages.0.schedule.peak=1e-3", "precision=fp32"])
    assert (run.seed, run.stages[0].tokens, run.stages[0].schedule.peak, run.precision) == (2, 5, 1e-3, "fp32")


def test_tokens_are_rounded_up_to_whole_steps(file):
    run = read_run([file(SMALLEST), "sequence_length=10", "batch.windows=4", "stages.0.tokens=401"])
    assert run.tokens_a_step == 40
    assert run.num_steps(run.stages[0]) == 11
    assert run.total_tokens == 440
    assert run.num_steps(dataclasses.replace(run.stages[0], tokens=400)) == 10


@pytest.mark.parametrize(
    ("accounting", "share", "tokens", "total"),
    [
        ("replaces_new", "1/4", 300, 300),
        ("adds_to_new", "1/4", 300, 400),
        ("adds_to_new", "0", 300, 300),
        ("adds_to_new", "1/3", 101, 152),  # 151.5: fewer would not hold 101 new ones
        ("adds_to_new", "99/100", 3 * 10**15, 3 * 10**17),
    ],
)
def test_replayed_tokens_replace_new_ones_or_come_on_top(file, accounting, share, tokens, total):
    words = [f"stages.0.replay={{share: {share}, accounting: {accounting}}}", f"stages.0.tokens={tokens}"]
    assert read_run([file(SMALLEST), *words]).stages[0].total_tokens == total


def test_the_part_for_the_engine_is_what_the_run_says(full):
    engine = full.engine
    assert (engine.precision, engine.zero, engine.batch, engine.optimizer, engine.deepspeed) == (
        "fp32", 3, full.batch, full.optimizer, full.deepspeed,
    )  # fmt: skip


CHILD = SMALLEST.replace("model: {name: llama, vocabulary: 100}", "parent: {run: PARENT}")


def test_a_child_takes_model_and_sequence_length_from_its_parent(file, full, tmp_path):
    write_yaml(full, Path(file("", "base/run.yaml")))
    child = read_run([file(CHILD), f"parent.run={tmp_path}/base"])
    assert child.model == full.model
    assert child.sequence_length == 64
    assert child.precision == "bf16"


def test_a_child_may_choose_another_sequence_length(file, tmp_path):
    file(SMALLEST, "base/run.yaml")
    assert read_run([file(CHILD), f"parent.run={tmp_path}/base", "sequence_length=128"]).sequence_length == 128


def held_out_of_child(file, above: list[str], *words: str):
    """What a child of a run with the settings `above` scores."""
    base = read_run([file(SMALLEST), *above])
    path = Path(file("", "base/run.yaml"))
    write_yaml(base, path)
    return read_run([file(CHILD, "child.yaml"), f"parent.run={path.parent}", *words]).evaluation


def test_a_child_scores_all_that_its_parent_does_beside_its_own(file):
    above = ["evaluation.held_out={en: en-held, fr: fr-held}"]
    told = held_out_of_child(file, above, "evaluation.held_out.de=de-held")
    assert list(told.held_out.items()) == [("de", Path("de-held")), ("en", Path("en-held")), ("fr", Path("fr-held"))]


def test_a_name_that_the_child_uses_itself_is_its_own_text(file):
    told = held_out_of_child(file, ["evaluation.held_out.prose=old"], "evaluation.held_out.prose=new")
    assert told.held_out == {"prose": Path("new")}
    assert not held_out_of_child(file, ["evaluation.held_out.prose=old"], "stages.0.sources.prose.hold_out=1%").held_out


def test_what_a_parents_source_held_out_is_scored_by_its_grandchildren(file):
    child = held_out_of_child(file, ["stages.0.sources.prose.hold_out=1/20"], "stages.0.sources.prose.corpus=data/law")
    assert {name: end.share for name, end in child.ends.items()} == {"prose": Fraction(1, 20)}
    grandchild = held_out_of_child(file, ["evaluation.ends={prose: {corpus: data/prose, share: 1/20}}"])
    assert grandchild.ends == child.ends and grandchild.ends["prose"].corpus.name == "prose"


def test_a_child_that_is_told_not_to_inherits_no_held_out_text(file):
    above = ["evaluation.held_out.en=en-held", "stages.0.sources.prose.hold_out=1/20"]
    told = held_out_of_child(file, above, "evaluation.inherit=false")
    assert (told.held_out, told.ends) == ({}, {})


def test_a_limit_alone_is_a_list_of_one_and_several_are_read(full, file):
    assert [(limit.source, limit.above) for limit in full.stop_if.forgetting] == [("no", 0.1)]
    words = [
        "evaluation.held_out={a: x, b: y}",
        "stop_if.forgetting=[{source: a, above: 0.1}, {source: b, above: 2e-1}]",
    ]
    run = read_run([file(SMALLEST), *words])
    assert [limit.above for limit in run.stop_if.forgetting] == [0.1, 0.2]
    assert not differences(as_mapping(run), as_mapping(read_run([file(SMALLEST)]))), "free to change"


def test_limits_that_cannot_work_are_faults(file):
    words = ["stop_if.forgetting={source: en, above: 0.1}"]
    assert faults_of(file(SMALLEST), *words) == [
        "stop_if.forgetting.0.source = en: no held-out text is called so; scored are: none, name some in "
        "evaluation.held_out"
    ]
    assert faults_of(file(SMALLEST), *words, "evaluation.held_out.fr=x") == [
        "stop_if.forgetting.0.source = en: no held-out text is called so; scored are: fr"
    ]
    (told,) = faults_of(file(SMALLEST), "stop_if.forgetting={source: en, above: -1}", "evaluation.held_out.en=x")
    assert told == "stop_if.forgetting.0.above = -1: a number of nats, at least 0"


RAISING = ["raise_replay.forgetting={source: en, above: 0.1}", "evaluation={held_out: {en: x}, every_tokens: 1K}"]


def test_what_raises_replay_is_read_and_is_part_of_what_a_run_began_with(full, file):
    assert (full.raise_replay.gain, full.raise_replay.at_most) == (2.0, Fraction(3, 5))
    run = read_run([file(SMALLEST), *RAISING, "stages.0.replay.share=5%"])
    assert [(limit.source, limit.above) for limit in run.raise_replay.forgetting] == [("en", 0.1)], "one alone"
    other = read_run([file(SMALLEST), *RAISING, "stages.0.replay.share=5%", "raise_replay.gain=2"])
    assert differences(as_mapping(run), as_mapping(other)) == ["raise_replay.gain is 2.0, the run began with 1.0"]


def test_a_share_of_replay_that_cannot_be_raised_is_a_fault(file):
    def told(*words):
        return faults_of(file(SMALLEST), *RAISING, *words)

    assert told() == ["raise_replay: no stage replays anything; give one what to begin with, replay: {share: 5%}"]
    assert told("stages.0.replay.share=5%", "evaluation.every_tokens=null") == [
        "raise_replay: it looks at evaluations within a stage; set evaluation.every_tokens"
    ]
    assert told("stages.0.replay.share=60%") == [
        "stages.0.replay.share = 0.6: with raise_replay it is what the share begins with and never falls below: above "
        "0 and at most raise_replay.at_most = 0.5"
    ]
    assert told("stages.0.replay.share=0")[0].startswith("stages.0.replay.share = 0: with raise_replay it is what")
    assert told("stages.0.replay={share: 5%, ramp: {start: 10%, tokens: 1}}") == [
        "stages.0.replay.ramp with raise_replay: both move the share; leave one of them out"
    ]
    assert told("stages.0.replay.share=5%", "raise_replay.forgetting={source: de, above: 0.1}") == [
        "raise_replay.forgetting.0.source = de: no held-out text is called so; scored are: en"
    ]


def test_an_end_of_a_corpus_that_is_nothing_or_all_of_it_is_a_fault(file):
    words = "evaluation.ends={a: {corpus: x, share: 0}, b: {corpus: x, share: 1}}"
    assert faults_of(file(SMALLEST), words) == [
        "evaluation.ends.a.share = 0.0: above 0 and below 1", "evaluation.ends.b.share = 1.0: above 0 and below 1",
    ]  # fmt: skip


def test_a_parent_is_found_from_the_home_folder(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file(SMALLEST, "base/run.yaml")
    assert read_run([file(CHILD), "parent.run=~/base"]).model.vocabulary == 100


def test_a_parent_that_is_not_there_is_told_with_its_neighbours_and_all_other_faults(file, tmp_path):
    file(SMALLEST, "runs/b/run.yaml")
    file(SMALLEST, "runs/a/run.yaml")
    lines = faults_of(file(CHILD), f"parent.run={tmp_path}/runs/c", "sed=3", "zero=9")
    assert lines == [
        f"parent.run = {tmp_path}/runs/c: there is no run (no {tmp_path}/runs/c/run.yaml); beside it there are: a, b",
        "sed: there is no such setting; did you mean seed?",
        "zero = 9 is not known; known: 0, 1, 2, 3",
    ]


def test_a_parent_with_a_damaged_run_yaml_is_a_fault(file, tmp_path):
    file("a: [1", "base/run.yaml")
    assert "base/run.yaml: line 1: not YAML: " in faults_of(file(CHILD), f"parent.run={tmp_path}/base")[0]


def test_a_parent_in_the_home_of_nobody_is_a_fault(file):
    missing, no_path = faults_of(file(CHILD), "parent.run=~nobody-of-that-name/base")
    assert missing.startswith("parent.run = ~nobody-of-that-name/base: there is no run")
    assert no_path.startswith("parent.run = '~nobody-of-that-name/base': expected a path")


def test_a_parent_that_is_only_a_name_is_a_fault(file):
    assert "parent = 'runs/base': expected 'key: value' lines, got str" in faults_of(file(SMALLEST), "parent=runs/base")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stages=[]", "stages: name at least one"),
        ("sequence_length=1", "sequence_length = 1: at least 2"),
        ("sequence_length=4096",
         "sequence_length = 4096: the model takes up to 2048; lower it or raise model.longest_sequence"),
        ("model=null",
         "model is not set; name one, such as {name: llama, vocabulary: 32000}, or a parent to take it from"),
        ("stages.0.tokens=0", "stages.0.tokens = 0: at least 1"),
        ("stages.0.sources={}",
         "stages.0.sources: name at least one, such as {code: {corpus: data/code}}"),
        ("stages.0.sources={replay/x: {corpus: a}}",
         "stages.0.sources.replay/x: names that begin with replay/ are taken by replay"),
        ("stages.0.replay.share=1", "stages.0.replay.share = 1.0: at least 0 and below 1"),
        ("stages.0.schedule={name: cosine, peak: 1, warmup: 20K}",
         "stages.0.schedule.warmup = 20000: 20,000 tokens, the stage has 10,000; make them shorter"),
        ("zero=0", "zero = 0 with precision = bf16: "),
        ("deepspeed.fp16.enabled=true",
         "deepspeed.fp16: this is set by precision and loss_scale here; take it out of the block, or write auto"),
        ("mesh.pipeline=0", "mesh.pipeline = 0: at least 1"),
        ("mesh.tensor=3", "mesh.tensor = 3 cannot split model.heads = 4 evenly; use 1, 2 or 4"),
        ("mesh.sequence=8", "mesh.sequence = 8 cannot split model.heads = 4 evenly; use 1, 2 or 4"),
        ("mesh.sequence_parallel_norms=true", "mesh.sequence_parallel_norms = true with mesh.tensor = 1: "),
        ("mesh.timeout_seconds=0", "mesh.timeout_seconds = 0: at least 1"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last = 0: at least 1"),
        ("checkpoint.every_tokens=0",
         "checkpoint.every_tokens = 0: at least 1; leave it out to save at stage ends only"),
        ("checkpoint.keep_every_tokens=0",
         "checkpoint.keep_every_tokens = 0: at least 1; leave it out to keep none"),
        ("checkpoint.temporary_every_minutes=0",
         "checkpoint.temporary_every_minutes = 0.0: above 0; leave it out to save by tokens"),
        ("checkpoint.most_failures=0", "checkpoint.most_failures = 0: at least 1, which ends the run at the first one"),
        ("log.every_steps=0", "log.every_steps = 0: at least 1"),
        ("log.peak_tflops=0", "log.peak_tflops = 0.0: above 0; leave it out to have it found"),
        ("evaluation.windows=-1", "evaluation.windows = -1: at least 1, or 0 for all"),
        ("evaluation.every_tokens=0",
         "evaluation.every_tokens = 0: at least 1; leave it out to score at stage ends only"),
        ("evaluation.micro_batch=0", "evaluation.micro_batch = 0: at least 1"),
        ("batch.windows=0", "batch.windows = 0: at least 1"),
        ("optimizer.beta1=1", "optimizer.beta1 = 1.0: at least 0 and below 1"),
        ("kernels.attention=fast", "kernels.attention = fast is not known; use auto, "),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_line_that_names_the_setting(file, word, told):
    (line,) = faults_of(file(SMALLEST), word)
    assert line == told or (told.endswith(" ") and line.startswith(told))


def test_the_flops_profiler_does_not_go_with_compiled_blocks_that_are_computed_again(file):
    words = ["deepspeed.flops_profiler={enabled: true}", "compile.blocks=true", "recompute.mode=full"]
    assert faults_of(file(SMALLEST), *words) == [
        "deepspeed.flops_profiler with compile.blocks and recompute.mode = full: it exchanges torch's functions "
        "between a block and its second run, which then differ; leave one of the three out"
    ]
    read_run([file(SMALLEST), *words[:2]])


def test_a_parent_at_a_place_that_is_no_step_is_a_fault(file, tmp_path):
    file(SMALLEST, "base/run.yaml")
    assert faults_of(file(CHILD), f"parent.run={tmp_path}/base", "parent.at=last") == [
        "parent.at = last: a step, or latest"
    ]


def test_two_stages_of_one_name_are_a_fault(file):
    stage = "{name: a, tokens: 5, sources: {x: {corpus: y}}, schedule: {name: constant, peak: 1}}"
    assert faults_of(file(SMALLEST), f"stages=[{stage}, {stage}]") == [
        "stages: more than one is called a; give each its own name"
    ]


def test_contradictions_of_all_parts_are_told_at_once(file):
    words = ["zero=0", "sequence_length=1", "log.every_steps=0", "stages.0.tokens=0", "deepspeed.fp16=true"]
    assert len(faults_of(file(SMALLEST), *words)) == 5


def test_a_run_is_equal_to_itself(full):
    assert differences(as_mapping(full), as_mapping(full)) == []


@pytest.mark.parametrize(
    "word",
    ["output=elsewhere", "zero=2", "mesh.timeout_seconds=5", "kernels.all=plain", "evaluation.windows=3",
     "evaluation.held_out.x=y", "checkpoint.keep_last=9", "log.every_steps=7", "deepspeed.wall_clock_breakdown=true",
     "batch.micro_batch=1"],
)  # fmt: skip
def test_what_only_alters_how_a_step_is_computed_is_free_to_change(file, word):
    one, other = read_run([file(SMALLEST)]), read_run([file(SMALLEST), word])
    assert as_mapping(one) != as_mapping(other)
    assert differences(as_mapping(one), as_mapping(other)) == []


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=2", ["seed is 2, the run began with 1"]),
        ("precision=fp32", ["precision is fp32, the run began with bf16"]),
        ("stages.0.tokens=5", ["stages.0.tokens is 5, the run began with 10000"]),
        ("stages.0.sources.prose.share=1/3", ["stages.0.sources.prose.share is 1/3, the run began with 1.0"]),
        ("stages.0.schedule.peak=1", ["stages.0.schedule.peak is 1.0, the run began with 0.0003"]),
        ("model.width=64", ["model.width is 64, the run began with 256"]),
        (
            "methods=[l2_to_start]",
            [
                "methods is not set, the run began with []",
                "methods.0.name is l2_to_start, the run began with none",
                "methods.0.strength is 0.1, the run began with none",
            ],
        ),
    ],
)
def test_what_alters_what_is_learned_is_told_with_both_values(file, word, told):
    one, other = read_run([file(SMALLEST)]), read_run([file(SMALLEST), word])
    assert differences(as_mapping(one), as_mapping(other)) == told


def test_a_setting_taken_away_is_told(file):
    one = read_run([file(SMALLEST), "stages.0.sources.more={corpus: x}"])
    assert differences(as_mapping(one), as_mapping(read_run([file(SMALLEST)]))) == [
        "stages.0.sources.more.corpus is not set, the run began with x",
        "stages.0.sources.more.share is not set, the run began with 1.0",
        "stages.0.sources.more.hold_out is not set, the run began with 0.0",
    ]


def test_a_child_may_change_one_setting_of_its_parents_model(file, tmp_path):
    file(SMALLEST, "above/run.yaml")
    run = read_run([file(CHILD), "model.longest_sequence=4096", f"parent.run={tmp_path / 'above'}"])
    assert (run.model.longest_sequence, run.model.vocabulary) == (4096, 100)


def test_a_child_in_its_parents_folder_is_refused(file, tmp_path):
    file(SMALLEST, "above/run.yaml")
    above = tmp_path / "above"
    assert faults_of(file(SMALLEST), f"parent.run={above}", f"output={above}") == [
        f"output = {above}: this is the parent's own folder; name another"
    ]


def test_the_same_method_twice_is_refused(file):
    assert faults_of(file(SMALLEST), "methods=[reptile, {name: reptile, every: 5}]") == [
        "methods: reptile is named more than once; they would share their state"
    ]


def test_held_out_text_that_means_two_things_is_refused(file):
    words = ["stages.0.sources.prose.hold_out=1%", "evaluation.held_out.prose=data/x"]
    assert faults_of(file(SMALLEST), *words) == [
        "stages.0.sources.prose.hold_out: evaluation.held_out names other text prose; rename one of them"
    ]
    two = SMALLEST + SMALLEST[SMALLEST.index("- name") :].replace("name: prose", "name: again")
    words = ["stages.0.sources.prose.hold_out=1%", "stages.1.sources.prose.hold_out=2%"]
    assert faults_of(file(two), *words) == [
        "stages.1.sources.prose.hold_out: an earlier stage holds out something else as prose; make them the same"
    ]


def test_a_ramp_longer_than_its_stage_is_refused(file):
    words = ["stages.0.replay={share: 0.1, ramp: {start: 0.5, tokens: 10001}}"]
    assert faults_of(file(SMALLEST), *words) == [
        "stages.0.replay.ramp.tokens = 10001: the stage has 10000 in all; lower it"
    ]


def test_a_run_that_an_earlier_release_began_lacks_nothing(file):
    plain, earlier = (as_mapping(read_run([file(SMALLEST)])) for _ in range(2))
    del earlier["attention"], earlier["loader"]
    del earlier["stages"][0]["sources"]["prose"]["hold_out"]
    assert differences(in_full(earlier), plain) == []


@pytest.mark.parametrize(("attention", "is_within"), [(None, True), ("across_documents", False)])
def test_attention_is_the_models_own_custom_unless_told(file, attention, is_within):
    words = [f"attention={attention}"] if attention else []
    assert read_run([file(SMALLEST), *words]).is_within_documents == is_within


GROWING = "stages.0.batch_warmup={windows: 4, tokens: 1000, increment: 2}"


def test_a_batch_that_grows_is_counted_plateau_by_plateau(file):
    """From 4 to 8 windows of 12 tokens by 2, over 1,000 tokens: it grows at 500 and at 1,000."""
    words = [file(SMALLEST), GROWING, "batch={windows: 8, micro_batch: 2}", "sequence_length=12"]
    run = read_run([*words, "stages.0.tokens=2000"])
    (stage,) = run.stages
    expected, tokens, sizes = [(0, 4), (499, 4), (500, 6), (999, 6), (1000, 8), (1999, 8)], 0, []
    assert [(at, run.windows_at(stage, Progress(stage_tokens=at))) for at, _ in expected] == expected
    while tokens < 2000:
        sizes.append(run.windows_at(stage, Progress(stage_tokens=tokens)))
        tokens += 12 * sizes[-1]
    assert sizes == [4] * 11 + [6] * 7 + [8] * 11
    assert run.num_steps(stage) == len(sizes) and run.num_slots(stage) == sum(sizes)
    assert run.total_tokens == tokens == run.tokens_before_last_step(stage) + 96
    assert run.num_steps(stage, 12 * sum(sizes[:13])) == len(sizes) - 13
    assert run.num_slots(stage, 12 * sum(sizes[:13])) == sum(sizes)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stages.0.batch_warmup={windows: 3, tokens: 10}"],
         "stages.0.batch_warmup.windows = 3: it cannot grow by 3 at a time to batch.windows = 8; "
         "set increment to one of 1, 5"),
        (["stages.0.batch_warmup={windows: 9, tokens: 10}"],
         "stages.0.batch_warmup.windows = 9: it cannot grow by 9 at a time to batch.windows = 8; begin with fewer"),
        (["batch.micro_batch=null", GROWING],
         "stages.0.batch_warmup.windows: batch.micro_batch must be told, because the windows of a step change"),
        (["stages.0.batch_warmup={windows: 4, tokens: 3000}"],
         "stages.0.batch_warmup.tokens = 3000: the stage has 2,000"),
        (["stages.0.batch_warmup={windows: 0, tokens: 10}"], "stages.0.batch_warmup.windows = 0: at least 1"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_grow_so_is_told(file, words, told):
    settings = ["batch={windows: 8, micro_batch: 2}", "sequence_length=12", "stages.0.tokens=2000"]
    with pytest.raises(Fault) as caught:
        read_run([file(SMALLEST), *settings, *words])
    assert told in caught.value.lines


def test_ranks_must_divide_every_batch_on_the_way(file):
    settings = ["batch={windows: 8, micro_batch: 2}", "sequence_length=12", "stages.0.tokens=2000"]
    run = read_run([file(SMALLEST), *settings, GROWING])
    assert run.faults_on(1) == []
    assert run.faults_on(2) == [
        "stages.0.batch_warmup.increment = 2: on 2 ranks that see different windows, in micro-batches of 2, it must be "
        "a multiple of 4"
    ]


OVERLAP = "compile={blocks: true, overlaps_sums: true}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zero=1"], "with mesh.tensor = 1: it is sums over tensor ranks that it lets go on; leave it out"),
        (["zero=3", "mesh.tensor=2"], "with zero = 3: blocks are compiled operation by operation then; use zero = 2"),
        (["zero=1", "mesh.tensor=2", "recompute.mode=selective", "attention=within_document"],
         "with recompute.mode = selective within documents: blocks are compiled operation by operation then; "
         "use none or full"),
    ],
)  # fmt: skip
def test_an_order_of_sums_where_there_are_none_or_blocks_are_not_compiled_whole_is_refused(file, words, told):
    with pytest.raises(Fault) as caught:
        read_run([file(SMALLEST), OVERLAP, *words])
    assert [line for line in caught.value.lines if "overlaps_sums" in line] == [f"compile.overlaps_sums = true {told}"]


@pytest.mark.parametrize(
    "words", [[], ["recompute.mode=full"], ["recompute.mode=selective", "attention=across_documents"]]
)
def test_an_order_of_sums_is_taken_where_blocks_are_compiled_whole(file, words):
    run = read_run([file(SMALLEST), OVERLAP, "zero=2", "mesh.tensor=2", *words])
    assert run.compile.overlaps_sums


@pytest.mark.parametrize("name", ["zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights"])
def test_groups_of_neighbouring_ranks_are_refused_with_tensor_ranks_before_any_meet(file, name):
    word = f"deepspeed={{zero_optimization: {{{name}: 2}}}}"
    with pytest.raises(Fault, match=f"deepspeed.zero_optimization.{name} with mesh.tensor = 2: DeepSpeed would make"):
        read_run([file(SMALLEST), word, "zero=3", "mesh.tensor=2"])
