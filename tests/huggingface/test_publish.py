"""Out to Hugging Face: what is written is the trained model, transformers agrees, and nothing else ever appears."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from cpt.config.faults import Fault
from cpt.huggingface import publish, read_folder, verify
from cpt.huggingface.architectures import llama as in_their_words
from cpt.models.llama import Model, Settings
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

SMALL = Settings(vocabulary=131, width=48, layers=2, heads=6, kv_heads=2, mlp_width=72, rope_base=500.0,
                 initial_std=0.2, longest_sequence=64)  # fmt: skip
TIED = dataclasses.replace(SMALL, tied=True)
BYTES = 10**9


def weights_of(settings: Settings) -> dict[str, torch.Tensor]:
    model = Model(settings, choose(KernelSettings(), torch.device("cpu")))
    model.initialise(5)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def published(settings: Settings, output: Path, dtype=torch.float32, **named) -> dict:
    return publish("llama", settings, weights_of(settings), output, dtype=dtype, **named)


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    """A byte-level BPE of 100 tokens with <s> = 0 and </s> = 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def assert_nothing_left(parent: Path, *allowed: str) -> None:
    assert sorted(path.name for path in parent.iterdir()) == sorted(allowed)


@pytest.mark.parametrize("max_shard_bytes", [BYTES, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [SMALL, TIED], ids=["untied", "tied"])
def test_what_goes_out_comes_in_again_bit_for_bit(tmp_path, settings, dtype, max_shard_bytes):
    published(settings, tmp_path / "model", dtype, max_shard_bytes=max_shard_bytes)
    name, read_settings, weights = read_folder(tmp_path / "model")
    assert name == "llama"
    assert in_their_words.config_of(read_settings) == in_their_words.config_of(settings)
    assert list(weights) == list(settings.shapes)
    for ours, trained in weights_of(settings).items():
        assert torch.equal(weights[ours], trained.to(dtype)) and weights[ours].dtype is dtype


def test_going_out_a_second_time_gives_the_same_files(tmp_path):
    published(SMALL, tmp_path / "first", torch.bfloat16, max_shard_bytes=20_000)
    _, settings, weights = read_folder(tmp_path / "first")
    publish("llama", settings, weights, tmp_path / "second", dtype=torch.bfloat16, max_shard_bytes=20_000)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert first.keys() == second.keys()
    # The certificate tells what rounding cost: nothing the second time.
    assert [name for name in first if first[name] != second[name]] == ["certificate.json"]
    assert verify(tmp_path / "first", tmp_path / "second") == []


def test_shards_hold_what_the_index_says_and_stay_below_the_limit(tmp_path):
    published(SMALL, tmp_path / "model", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"] == {"total_parameters": SMALL.num_parameters, "total_size": 4 * SMALL.num_parameters}
    # 25 152 bytes: the embedding, larger than the limit and therefore alone.
    assert all((tmp_path / "model" / shard).stat().st_size < 27_000 for shard in shards)


@pytest.mark.parametrize("settings", [SMALL, TIED], ids=["untied", "tied"])
def test_transformers_loads_it_without_a_warning_and_gives_our_logits(tmp_path, settings, caplog):
    from transformers import AutoModelForCausalLM

    published(settings, tmp_path / "model", max_shard_bytes=20_000)
    with caplog.at_level(logging.WARNING):
        theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert not any(told.values())
    assert theirs.dtype is torch.float32
    ours = Model(settings, choose(KernelSettings(), torch.device("cpu")))
    ours.load_state_dict(weights_of(settings), strict=not settings.tied)
    tokens = torch.arange(37)[None] * 3
    assert (ours(tokens) - theirs(input_ids=tokens).logits).abs().max() < 1e-5


def test_the_certificate_accounts_for_every_tensor_and_tells_the_losses(tmp_path, tokenizer_folder):
    probe = torch.randint(131, (3, 20), generator=torch.Generator().manual_seed(1))
    certificate = published(
        TIED, tmp_path / "model", torch.bfloat16, tokenizer_folder=tokenizer_folder, probe_tokens=probe
    )
    assert certificate == json.loads((tmp_path / "model/certificate.json").read_text())
    assert {tensor["from"] for tensor in certificate["tensors"].values()} == set(TIED.shapes)
    assert certificate["tied"] and certificate["rows_removed"] == 0 and certificate["dtype"] == "bfloat16"
    assert certificate["rope"] == {"rope_theta": 500.0, "rope_type": "default"}
    assert set(certificate["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}
    told = certificate["probe"]
    assert told["tokens"] == 3 * 19 and told["top_1_agreement"] == 1.0
    assert told["loss_difference"] < 1e-5 < abs(told["loss_trained"] - told["loss_trained_rounded"]) < 0.1
    assert told["largest_logit_difference"] < 1e-5 * told["largest_logit"]


def test_the_probe_loss_is_that_of_the_trained_model(tmp_path):
    probe = torch.randint(131, (3, 20), generator=torch.Generator().manual_seed(1))
    certificate = published(SMALL, tmp_path / "model", probe_tokens=probe)
    model = Model(SMALL, choose(KernelSettings(), torch.device("cpu")))
    model.load_state_dict(weights_of(SMALL))
    loss = model(probe[:, :-1], probe[:, 1:]).mean().item()
    for name in ("loss_trained", "loss_trained_rounded", "loss_transformers"):
        assert certificate["probe"][name] == pytest.approx(loss, abs=1e-5)


def test_tokenizer_files_go_along_byte_for_byte_and_name_the_special_tokens(tmp_path, tokenizer_folder):
    (tokenizer_folder / "model.safetensors").write_text("not a tokenizer's")
    published(SMALL, tmp_path / "model", tokenizer_folder=tokenizer_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "model" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (0, 1)


def test_a_pipeline_generates_text_from_the_folder(tmp_path, tokenizer_folder):
    from transformers import pipeline

    published(SMALL, tmp_path / "model", torch.bfloat16, tokenizer_folder=tokenizer_folder)
    generate = pipeline("text-generation", model=str(tmp_path / "model"))
    text = generate("the quick", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("the quick") and len(text) > len("the quick")


def test_weights_may_be_functions_that_fetch_them(tmp_path):
    lazy = {name: (lambda tensor=tensor: tensor) for name, tensor in weights_of(SMALL).items()}
    publish("llama", SMALL, lazy, tmp_path / "model", dtype=torch.float32)
    assert torch.equal(read_folder(tmp_path / "model")[2]["norm.weight"], torch.ones(48))


def test_the_model_card_tells_the_lineage(tmp_path):
    published(SMALL, tmp_path / "model", lineage={"run": "replay", "parent": {"run": "runs/base", "step": 244}})
    card = (tmp_path / "model/README.md").read_text()
    assert "library_name: transformers" in card and '"run": "runs/base"' in card


def test_publishing_leaves_the_random_numbers_of_the_run_alone(tmp_path):
    weights = weights_of(SMALL)
    before = torch.get_rng_state()
    publish("llama", SMALL, weights, tmp_path / "model", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_folder_may_be_filled_and_a_used_one_not(tmp_path):
    (tmp_path / "model").mkdir()
    published(SMALL, tmp_path / "model")
    with pytest.raises(Fault, match="is in use; name a folder that is not there yet"):
        published(SMALL, tmp_path / "model")
    assert_nothing_left(tmp_path, "model")


def spoil(name: str, change):
    def spoiled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, name: change(weights[name].clone())}

    return spoiled


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[7] = float("nan")
    return tensor


BAD_WEIGHTS = {
    "NaN": (spoil("blocks.1.mlp.up.weight", with_nan), torch.float32,
            r"weight blocks\.1\.mlp\.up\.weight: 1 of 3456 values are NaN or infinite"),
    "too large": (spoil("norm.weight", lambda tensor: tensor * 1e5), torch.float16,
                  r"weight norm\.weight: 48 of 48 values are too large for float16; export as bfloat16 or float32"),
    "another shape": (spoil("embedding.weight", lambda tensor: tensor[:-1]), torch.float32,
                      r"weight embedding\.weight has shape \(130, 48\); the settings of the model say \(131, 48\)"),
    "missing": (lambda weights: {n: w for n, w in weights.items() if n != "norm.weight"}, torch.float32,
                r"weight norm\.weight is missing"),
    "extra": (lambda weights: {**weights, "anchor": torch.zeros(1)}, torch.float32,
              "weight anchor is not part of the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, case):
    change, dtype, message = BAD_WEIGHTS[case]
    with pytest.raises(Fault, match=message):
        publish("llama", SMALL, change(weights_of(SMALL)), tmp_path / "model", dtype=dtype)
    assert_nothing_left(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_folder):
    small = dataclasses.replace(SMALL, vocabulary=50)
    with pytest.raises(Fault, match=r"the tokenizer has \d+ tokens, the model 50; another one\?"):
        published(small, tmp_path / "model", tokenizer_folder=tokenizer_folder)
    assert_nothing_left(tmp_path, "tokenizer")


def test_a_folder_without_a_tokenizer_is_refused_as_one(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Fault, match=r"empty has neither tokenizer\.json nor tokenizer\.model"):
        published(SMALL, tmp_path / "model", tokenizer_folder=tmp_path / "empty")
    assert_nothing_left(tmp_path, "empty")


@pytest.mark.parametrize("call, at", [("pwrite", 2), ("fsync", 0)], ids=["while writing", "when all is written"])
def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(tmp_path, monkeypatch, call, at):
    real, calls = getattr(os, call), []

    def full(*given):
        calls.append(given)
        if len(calls) > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(Fault) as raised:
        published(SMALL, tmp_path / "model", max_shard_bytes=20_000)
    assert str(raised.value) == f"{tmp_path / 'model'} cannot be written: No space left on device"
    assert_nothing_left(tmp_path)


def test_an_output_that_cannot_be_a_folder_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fault, match="file/model cannot be written: Not a directory"):
        published(SMALL, tmp_path / "file/model")


def test_a_model_without_a_hugging_face_form_is_refused(tmp_path):
    with pytest.raises(Fault, match=r"model\.name = lama: no Hugging Face form of it is known here; there is llama"):
        publish("lama", SMALL, weights_of(SMALL), tmp_path / "model", dtype=torch.float32)
    assert_nothing_left(tmp_path)
