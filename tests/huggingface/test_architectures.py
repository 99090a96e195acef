"""config.json in and out: each family of transformers as it writes itself, old files, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from cpt_harness.parity import VARIANTS

from cpt.config import Fault, build, name_of_choice
from cpt.huggingface import architectures, read_folder
from cpt.huggingface.architectures import Stored
from cpt.models import llama, pythia
from cpt.models.rope_scaling import dynamic, linear, llama3, yarn
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

FIXTURES = Path(__file__).parents[3] / "shared/data/fixtures"
SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
         "num_attention_heads": 6}  # fmt: skip
MISTRAL = {**SIZES, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {**SIZES, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 3}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
NEOX = {**SIZES, "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}


def settings_of(config: dict):
    name, file = architectures.of_config(config, "c")
    settings = file.settings_of(config, "c")
    assert name_of_choice(settings) == name
    return settings


def refused(config: dict) -> list[str]:
    with pytest.raises(Fault) as raised:
        settings_of(config)
    return [line.removeprefix("c: ") for line in raised.value.lines]


def is_there(name: str) -> Path:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; it lies beside the checkout where fixtures are shared")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_is_read_as_what_it_was(variant):
    settings = VARIANTS[variant]
    file = architectures.of_model(name_of_choice(settings))
    config = json.loads(json.dumps(file.config_of(settings)))
    assert config["rope_parameters"]["rope_theta"] == settings.rope_base
    assert file.config_of(settings_of(config)) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes_again_is_read_alike(variant, tmp_path):
    from transformers import CONFIG_MAPPING

    file = architectures.of_model(name_of_choice(VARIANTS[variant]))
    config = file.config_of(VARIANTS[variant])
    CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config)).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert file.config_of(settings_of(again)) == config


THEIRS = {
    "Mistral": {**MISTRAL, "sliding_window": None, "head_dim": 10, "rms_norm_eps": 1e-3},
    "Mistral with a window as long as its sequences": {**MISTRAL, "sliding_window": 64, "max_position_embeddings": 64},
    "Qwen2 that names a window it does not use": {**QWEN2, "use_sliding_window": False, "sliding_window": 8},
    "Qwen2, only the needed lines": {**QWEN2, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "Qwen2 with yarn in the words of before transformers 5": {
        **QWEN2, "rope_theta": 1e4, "max_position_embeddings": 64,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "Llama 3.1 in the words of before transformers 5": {
        **LLAMA, "num_key_value_heads": 2, "rope_theta": 500.0, "max_position_embeddings": 64,
        "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 16},
    },
    "Llama with yarn and two scales": {
        **LLAMA, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 2.0,
                            "mscale_all_dim": 0.5, "original_max_position_embeddings": 16},
    },
    "Llama with dynamic scaling": {**LLAMA, "max_position_embeddings": 16,
                                   "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "GPT-NeoX, only the needed lines": {**NEOX, "hidden_size": 96},
    "GPT-NeoX in old words": {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 700, "hidden_act": "gelu_fast",
                              "use_parallel_residual": False},
    "GPT-NeoX by gelu_new": {**NEOX, "rotary_pct": 1.0, "hidden_act": "gelu_new", "attention_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_a_model_of_theirs_gives_the_same_logits_as_ours_that_is_made_of_its_files(case, tmp_path):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    told = THEIRS[case]
    torch.manual_seed(7)
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[told["model_type"]](**{**told, "initializer_range": 0.2}))
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told))
    name, settings, weights = read_folder(tmp_path)
    ours = build(settings, "Model", choose(KernelSettings(), torch.device("cpu")))
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            parameter.copy_(weights[parameter_name])
        tokens = torch.randint(131, (2, 37), generator=torch.Generator().manual_seed(3))
        expected = theirs(input_ids=tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_mistral_and_qwen2_go_out_as_what_computes_the_same():
    out = architectures.of_model("llama").config_of
    assert out(settings_of({**MISTRAL, "sliding_window": None}))["architectures"] == ["LlamaForCausalLM"]
    assert out(settings_of(QWEN2))["architectures"] == ["Qwen2ForCausalLM"]


def test_lines_that_are_left_out_are_those_of_each_family():
    mistral = settings_of({**SIZES, "model_type": "mistral", "sliding_window": None, "num_attention_heads": 8})
    qwen2 = settings_of({**QWEN2, "num_key_value_heads": None})
    assert (mistral.kv_heads, mistral.longest_sequence) == (8, 131072)
    assert (qwen2.num_kv_heads, qwen2.longest_sequence, qwen2.attention_bias) == (6, 32768, "qkv")


@pytest.mark.parametrize(("config", "line"), [
    ({**MISTRAL, "max_position_embeddings": 8192},
     "sliding_window = 4096: our llama attends to all of max_position_embeddings = 8192 positions; for sequences of up"
     " to 4096, where a window hides nothing, set max_position_embeddings to 4096"),
    ({**QWEN2, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window = 4096: our llama attends to all"),
    ({**QWEN2, "use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
     "sliding_window = 9: our llama attends to all"),
    ({**LLAMA, "attention_bias": "yes"}, "attention_bias = 'yes': expected true or false"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = gelu: our llama has only hidden_act = silu"),
    ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 2.0}},
     "rope_scaling: rope_type = longrope: we have default, linear, dynamic, llama3, yarn"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor is not set; it has no default"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5: a reach grows by"),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": -1.0}},
     "rope_scaling.low_freq_factor = -1.0: must be more than 0"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
     "rope_scaling: beta_fast = 3: linear has no such line"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "yarn"}},
     "but rope_scaling = ('linear', {'factor': 2.0}): they must be equal"),
    ({**LLAMA, "rope_parameters": [1.0]}, "rope_parameters = [1.0]: expected names and values"),
    ({**QWEN2, "rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
     "rope_parameters.full_attention: our models have one rotary position for all layers"),
    ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": "x", "mscale": 1, "mscale_all_dim": 2}},
     "rope_scaling.factor = 'x': expected a number"),
    ({**NEOX, "rope_parameters": {"partial_rotary_factor": "x"}}, "partial_rotary_factor = 'x': expected a number"),
    ({**LLAMA, "rope_theta": "many"}, "rope_theta = 'many': expected a number"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: our llama has only 1"),
    ({**NEOX, "hidden_act": "relu"}, "hidden_act = relu: our pythia has gelu, gelu_python, gelu_pytorch_tanh, "),
    ({**NEOX, "rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
     "rotary_pct = 0.5 but rope_parameters.partial_rotary_factor = 0.25: they must be equal"),
    ({**NEOX, "rotary_emb_base": 9, "rope_parameters": {"rope_theta": 10}},
     "rotary_emb_base = 9 but rope_parameters.rope_theta = 10: they must be equal"),
    ({**NEOX, "rotary_pct": "all"}, "rotary_pct = 'all': expected a number"),
    ({**NEOX, "rotary_pct": 0.1}, "rotary_share = 0.1: turns 0 of 8 entries of a head"),
    ({**NEOX, "hidden_size": None}, "hidden_size is missing"),
    ({**NEOX, "quantization_config": {"bits": 4}}, "our pythia has only quantization_config = None"),
])  # fmt: skip
def test_a_line_that_we_cannot_represent_is_refused(config, line):
    assert any(line in told for told in refused(config)), refused(config)


@pytest.mark.parametrize(("settings", "line"), [
    (llama.Settings(vocabulary=9, attention_bias="qkv", mlp_bias=True),
     "model.attention_bias = qkv with model.mlp_bias = true: there is no Hugging Face form of this model"),
    (llama.Settings(vocabulary=9, width=50, heads=4, head_width=12),
     "model.width = 50: there is no Hugging Face form of this model; transformers asks for a multiple of heads = 4"),
    (pythia.Settings(vocabulary=9, norm="rms_norm"),
     "model.norm = rms_norm: transformers' GPT-NeoX has none; there is no Hugging Face form of this model"),
    (pythia.Settings(vocabulary=9, mlp_bias=False), "model.mlp_bias = false: transformers' GPT-NeoX has no feed"),
])  # fmt: skip
def test_a_model_that_transformers_does_not_have_is_not_exported(settings, line):
    with pytest.raises(Fault) as raised:
        architectures.of_model(name_of_choice(settings)).config_of(settings)
    assert line in str(raised.value)


def test_dynamic_scaling_takes_the_longest_positions_for_the_original_ones():
    config = {**LLAMA, "max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    settings = settings_of(config)
    assert settings.rope_scaling == dynamic.Settings(4.0, 16) and settings.longest_sequence == 64
    assert architectures.of_model("llama").config_of(settings)["max_position_embeddings"] == 16


def test_scalings_have_their_own_words_and_are_written_for_old_readers_too():
    def written(scaling):
        settings = llama.Settings(vocabulary=9, rope_scaling=scaling)
        config = architectures.of_model("llama").config_of(settings)
        assert config["rope_parameters"] == {"rope_theta": 10000.0, **config["rope_scaling"]}
        return config["rope_scaling"]

    assert written(linear.Settings(2.0)) == {"rope_type": "linear", "factor": 2.0}
    assert written(llama3.Settings(8.0, 8192)) == {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }  # fmt: skip
    assert written(yarn.Settings(4.0, 99)) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": True,
    }  # fmt: skip


def test_a_joined_tensor_takes_rows_in_turn_and_gives_them_back():
    stored = Stored(("q", "k", "v"), rows=2)
    parts = [torch.arange(12.0).view(4, 3) + 100 * part for part in range(3)]
    joined = stored.join(parts)
    assert joined[:, 0].tolist() == [0, 3, 100, 103, 200, 203, 6, 9, 106, 109, 206, 209]
    assert stored.shape({"q": (4, 3)}) == joined.shape == (12, 3)
    assert all(torch.equal(part, again) for part, again in zip(parts, stored.split(joined), strict=True))
    assert Stored(("q",)).join(parts[:1]) is parts[0] and Stored(("q",)).split(parts[0])[0] is parts[0]


def test_query_key_and_value_of_pythia_lie_in_one_tensor_head_by_head():
    tensors = architectures.of_model("pythia").tensors(pythia.Settings(vocabulary=9, width=60, heads=5, layers=1))
    stored = tensors["gpt_neox.layers.0.attention.query_key_value.bias"]
    assert stored.ours == tuple(f"blocks.0.attention.{part}.bias" for part in ("query", "key", "value"))
    assert (stored.rows, stored.is_only_renamed) == (12, False)
    names = architectures.names(tensors)
    assert names["blocks.0.attention.key.weight"] == "gpt_neox.layers.0.attention.query_key_value.weight"
    assert set(names) == set(pythia.Settings(vocabulary=9, width=60, heads=5, layers=1).shapes)


@pytest.mark.parametrize("name", ["hf_gptneox_tiny", "hf_gptneox_tiny_legacy_bin"])
def test_a_trained_gpt_neox_scores_as_it_did_under_transformers(name):
    folder = is_there(name)
    golden = json.loads((folder / "golden.json").read_text())
    model_name, settings, weights = read_folder(folder)
    assert (model_name, settings.rotary_width, settings.rope_base) == ("pythia", 4, 10000.0)
    model = build(settings, "Model", choose(KernelSettings(), torch.device("cpu")))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])
        tokens = torch.tensor([golden["input_ids"]])
        losses = model(tokens[:, :-1], tokens[:, 1:])[0]
        last = model(tokens)[0, -1]
    assert losses.mean().item() == pytest.approx(golden["mean_next_token_loss"], abs=2e-6)
    assert (losses + torch.tensor(golden["token_logprobs"])).abs().max() < 2e-5  # they have 5 places
    assert (last[:16] - torch.tensor(golden["last_logits_first16"])).abs().max() < 2e-5
    top = last.topk(8)
    assert top.indices.tolist() == golden["last_top8"]["ids"]
    assert (top.values - torch.tensor(golden["last_top8"]["logits"])).abs().max() < 2e-5
