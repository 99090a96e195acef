"""Every file in configs/ is a run that can be read: known settings only, output under runs/.

Those in configs/models are the part of a run that says the model; see tests/models/test_named_sizes.py. Those that
say the arms of a study are read in tests/studies.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.config import read_mapping
from cpt.run import read_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent != ROOT / "configs/models" and "\narms:" not in path.read_text(encoding="utf-8")
)

PARENT = """
output: runs/parent
model: {name: llama, vocabulary: 32000, longest_sequence: 1048576}
sequence_length: 128
stages: [{name: a, tokens: 1, sources: {a: {corpus: a}}, schedule: {name: constant, peak: 1e-3}}]
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The config.json of a model of TinyLlama's kind, without weights: reading settings needs none."""
    folder = tmp_path_factory.mktemp("released")
    lines = {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **lines}))
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "parent"
    folder.mkdir()
    (folder / "run.yaml").write_text(PARENT)
    return folder


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_a_run_that_can_be_read(config, parent, released):
    said = read_mapping([str(ROOT / config)])
    words = [f"parent.run={parent}"] if "parent" in said else []
    words += [f"model.from={released}"] if "from" in said.get("model", {}) else []
    run = read_run([str(ROOT / config), *words])
    assert run.output.parts[0] == "runs"
    assert run.total_tokens > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_opens_with_a_line_that_says_what_it_is(config):
    assert (ROOT / config).read_text(encoding="utf-8").startswith("# ")


def test_no_two_configs_write_to_the_same_folder():
    outputs = [read_mapping([str(ROOT / config)])["output"] for config in CONFIGS]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.startswith("configs/quickstart/")])
def test_a_parent_in_the_quickstart_is_made_by_the_quickstart(config):
    outputs = {read_mapping([str(ROOT / config)])["output"] for config in CONFIGS}
    parent = read_mapping([str(ROOT / config)]).get("parent")
    assert parent is None or parent["run"] in outputs
