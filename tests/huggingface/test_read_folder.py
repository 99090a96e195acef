"""In from Hugging Face: what we read, and the one clear line for each folder that we do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt.config.faults import Fault
from cpt.huggingface import read_folder
from cpt.huggingface.architectures import llama as in_their_words
from cpt.huggingface.architectures import names
from cpt.models.llama import Settings

SMALL = Settings(vocabulary=31, width=16, layers=1, heads=4, kv_heads=2, mlp_width=24, rope_base=500.0)
NAMES = names(in_their_words.tensors(SMALL))


def tensors_of(settings: Settings = SMALL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    theirs = names(in_their_words.tensors(settings))
    return {theirs[name]: torch.randn(shape, generator=generator) for name, shape in settings.shapes.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(in_their_words.config_of(SMALL) if config is None else config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_with(**lines) -> dict:
    config = {**in_their_words.config_of(SMALL), **lines}
    return {name: value for name, value in config.items() if value != "left out"}


def refused(folder: Path) -> str:
    with pytest.raises(Fault) as raised:
        read_folder(folder)
    return str(raised.value)


def test_a_folder_of_transformers_itself_is_read(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**in_their_words.config_of(SMALL)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    name, settings, weights = read_folder(tmp_path / "theirs")
    assert (name, in_their_words.config_of(settings)) == ("llama", in_their_words.config_of(SMALL))
    for ours, their_name in NAMES.items():
        assert torch.equal(weights[ours], theirs.state_dict()[their_name])
    assert len(weights) == len(NAMES)


def test_an_old_config_without_rope_parameters_is_read(tmp_path):
    config = config_with(rope_parameters="left out", rope_scaling=None, head_dim="left out", torch_dtype="float32")
    _, settings, _ = read_folder(write(tmp_path / "old", tensors_of(), config))
    assert settings.rope_base == 500.0 and settings.width_of_head == 4


def test_what_a_config_leaves_out_has_the_default_of_transformers(tmp_path):
    optional = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_parameters", "tie_word_embeddings",
                "max_position_embeddings", "initializer_range", "architectures", "hidden_act")  # fmt: skip
    config = config_with(**dict.fromkeys(optional, "left out"))
    from transformers import LlamaConfig

    ours = in_their_words.settings_of(config, "")
    theirs = in_their_words.settings_of(LlamaConfig(**config).to_dict(), "")
    assert in_their_words.config_of(ours) == in_their_words.config_of(theirs)


def test_frequencies_that_old_files_hold_are_passed_over(tmp_path):
    tensors = {**tensors_of(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert set(read_folder(write(tmp_path / "old", tensors))[2]) == set(SMALL.shapes)


def test_a_tied_model_may_hold_its_embedding_twice_if_both_are_equal(tmp_path):
    config, tensors = config_with(tie_word_embeddings=True), tensors_of()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "head.weight" not in read_folder(write(tmp_path / "equal", tensors, config))[2]
    tensors["lm_head.weight"][3, 5] += 1
    message = "config.json ties lm_head.weight to model.embed_tokens.weight, but the two differ"
    assert message in refused(write(tmp_path / "unequal", tensors, config))


def test_a_legacy_bin_file_is_read_by_the_weights_only_reader(tmp_path):
    folder = write(tmp_path / "legacy", tensors_of())
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    weights = read_folder(folder)[2]
    assert all(torch.equal(weights[ours], tensors[theirs]) for ours, theirs in NAMES.items())


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("content", [{"model.norm.weight": RunsCode()}, {"model.norm.weight": [1.0]}, [1.0]],
                         ids=["code", "a list in place of a tensor", "no names"])  # fmt: skip
def test_a_legacy_bin_file_with_more_than_weights_is_refused(tmp_path, content):
    folder = write(tmp_path / "legacy", tensors_of())
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "more than weights" in (line := refused(folder)) or "something other than tensors by name" in line


BAD_CONFIGS = {
    "architecture": (config_with(architectures=["MambaForCausalLM"]),
                     "architectures = MambaForCausalLM: we do not have it; we have LlamaForCausalLM"),
    "no head": (config_with(architectures=["LlamaModel"]), "architectures = LlamaModel: we do not have it"),
    "nothing told": ({}, "architectures = None: we do not have it"),
    "two bases": (config_with(rope_theta=10000.0),
                  "rope_theta = 10000.0 but rope_parameters.rope_theta = 500.0: they must be equal"),
    "quantized": (config_with(quantization_config={"bits": 4}), "our llama has only quantization_config = None"),
    "missing line": (config_with(hidden_size="left out"), "hidden_size is missing"),
    "text": (config_with(hidden_size="16"), "hidden_size = '16': expected a number"),
    "contradiction": (config_with(num_key_value_heads=3), "kv_heads = 3: 4 heads cannot share them evenly"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_we_cannot_represent_is_refused_with_the_line(tmp_path, case):
    config, message = BAD_CONFIGS[case]
    folder = write(tmp_path / "model", tensors_of(), config)
    line = refused(folder)
    assert line.startswith(f"{folder / 'config.json'}: ") and message in line


def test_all_lines_that_we_cannot_represent_are_told_at_once(tmp_path):
    folder = write(
        tmp_path / "model", tensors_of(), config_with(partial_rotary_factor=0.5, hidden_act="gelu", vocab_size=None)
    )
    assert len(refused(folder).splitlines()) == 3


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    assert "config.json is missing; name a Hugging Face folder" in refused(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{")
    assert "config.json is not JSON" in refused(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("[]")
    assert "config.json holds a list, expected names and values" in refused(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(config_with()))
    assert "holds no weights; looked for model.safetensors" in refused(tmp_path / "model")
    (tmp_path / "file").write_text("")
    assert "config.json cannot be read: Not a directory" in refused(tmp_path / "file")


def test_a_missing_shard_and_an_absent_tensor_are_refused(tmp_path):
    folder, tensors = write(tmp_path / "model", tensors_of()), tensors_of()
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    file_of = {name: files[index % 2] for index, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    save_file({name: tensors[name] for name in tensors if file_of[name] == files[0]}, folder / files[0])
    assert f"index.json names {files[1]}, which is missing; copy it again" in refused(folder)
    second = [name for name in tensors if file_of[name] == files[1]]
    save_file({name: tensors[name] for name in second[1:]}, folder / files[1])
    assert f"index.json says that {files[1]} holds {second[0]}; it does not" in refused(folder)


def test_a_damaged_file_is_refused(tmp_path):
    folder = write(tmp_path / "model", tensors_of())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged" in refused(folder)


def test_missing_unknown_misshapen_and_mistyped_tensors_are_refused(tmp_path):
    tensors = tensors_of()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    lines = refused(write(tmp_path / "names", tensors)).splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "tensor model.norm.weight is missing",
        "tensor model.layers.0.self_attn.q_proj.bias is no part of LlamaForCausalLM as config.json describes it",
    ]
    tensors = tensors_of()
    tensors["model.norm.weight"] = torch.zeros(17)
    tensors["lm_head.weight"] = torch.zeros(31, 16, dtype=torch.int8)
    lines = refused(write(tmp_path / "shapes", tensors)).splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        "model.norm.weight has shape (17,); config.json says (16,)",
        "lm_head.weight is I8; we read F32, BF16, F16",
    ]


def test_many_faults_of_a_kind_are_cut_short(tmp_path):
    lines = refused(write(tmp_path / "model", {"other": torch.zeros(1)})).splitlines()
    assert len(lines) == 9 and lines[-1] == "... and 5 more of this kind"
