"""Llama in Hugging Face's words, and those of its relatives that compute the same: Mistral and Qwen2.

All three call their tensors alike. What goes out is a Llama, whatever came in, except where only query, key and value
have biases: that is a Qwen2. A Mistral comes in if its window is no shorter than its longest sequence; then it attends
to all positions, and is a Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpt.config.faults import Fault
from cpt.huggingface.architectures import _rope
from cpt.huggingface.architectures._lines import flags, no_numbers, other_than, told
from cpt.huggingface.architectures._stored import Stored, stored_by_tables
from cpt.models.llama import Settings

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

_OUTSIDE_BLOCKS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
# Begin with blocks.N. on our side, with model.layers.N. on theirs.
_IN_A_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
# What transformers takes where a line is missing: (num_key_value_heads, max_position_embeddings, sliding_window). A
# line that is there and null counts as told.
_DEFAULTS = {
    "llama": (None, 2048, None),
    "mistral": (8, 131072, 4096),
    "qwen2": (32, 32768, 4096),
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Lines that may be left out.
_NUMBERS = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "initializer_range", "max_position_embeddings", "sliding_window",
)  # fmt: skip
_FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")


def tensors(settings: Settings) -> dict[str, Stored]:
    """Their name of every tensor -> the one parameter of ours that it is; a tied head is not among them."""
    return stored_by_tables(settings.shapes, _OUTSIDE_BLOCKS, _IN_A_BLOCK, "model.layers")


def tied_names(settings: Settings) -> dict[str, str]:
    """Tensors of theirs that a tied model may hold a second time -> the tensor that they repeat."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if settings.tied else {}


def is_no_weight(name: str) -> bool:
    """Rotary frequencies, which files of 2023 hold as buffers."""
    return name.endswith(".rotary_emb.inv_freq")


def config_of(settings: Settings) -> dict[str, Any]:
    """The lines of config.json that say the model's shape. Raises Fault where neither Llama nor Qwen2 can be that."""
    is_qwen2 = settings.attention_bias == "qkv"
    if is_qwen2 and settings.mlp_bias:
        raise Fault(
            "model.attention_bias = qkv with model.mlp_bias = true: there is no Hugging Face form of this model; Qwen2"
            " has the one, Llama the other"
        )
    if settings.width % settings.heads:
        raise Fault(
            f"model.width = {settings.width}: there is no Hugging Face form of this model; transformers asks for a"
            f" multiple of heads = {settings.heads}, whatever head_width is"
        )
    architecture = "Qwen2ForCausalLM" if is_qwen2 else "LlamaForCausalLM"
    biases = {"attention_bias": settings.attention_bias == "all", "mlp_bias": settings.mlp_bias}
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.width_of_mlp,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.width_of_head,
        "hidden_act": "silu",
        **({"use_sliding_window": False} if is_qwen2 else biases),
        "max_position_embeddings": _rope.longest_of(settings),
        "initializer_range": settings.initial_std,
        "rms_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied,
        # Twice: readers of before transformers 5 know only the first, and take 10000 where it is missing.
        "rope_theta": settings.rope_base,
        **_rope.lines_of(settings, {}),
    }


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """Our settings from a config.json; what it leaves out has the default of transformers' own config.

    Raises Fault with every line that our Llama cannot represent, each beginning with `where`.
    """
    family = _family_of(config)
    kv_heads, max_positions, _ = _DEFAULTS[family]
    max_positions = told(config, "max_position_embeddings", max_positions)
    faults = no_numbers(config, _NEEDED, _NUMBERS) + flags(config, _FLAGS)
    faults += other_than(config, {"hidden_act": "silu", "quantization_config": None}, "llama")
    rope_base, base_faults = _rope.base_of(config, "rope_theta")
    rotary_share, share_faults = _rope.share_of(config, ("partial_rotary_factor",), 1.0)
    if rotary_share != 1.0:
        share_faults.append(f"partial_rotary_factor = {rotary_share}: our llama has only 1")
    rope_scaling, scaling_faults = _rope.scaling_of(config, max_positions)
    faults += base_faults + share_faults + scaling_faults
    if not faults:
        faults += _window_faults(config, family, max_positions)
    if not faults:
        settings = Settings(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads", kv_heads),
            head_width=config.get("head_dim"),
            mlp_width=config["intermediate_size"],
            attention_bias=_attention_bias(config, family),
            mlp_bias=family == "llama" and config.get("mlp_bias", False),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            norm_epsilon=told(config, "rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            initial_std=told(config, "initializer_range", 0.02),
            longest_sequence=_rope.longest_with(rope_scaling, max_positions),
        )
        faults = settings.faults()
    if faults:
        raise Fault(f"{where}: {line}" for line in faults)
    return settings


def _family_of(config: Mapping[str, Any]) -> str:
    asked = config.get("architectures") or []
    return ARCHITECTURES[asked[0]] if asked else config.get("model_type", "llama")


def _attention_bias(config: Mapping[str, Any], family: str) -> str:
    """Mistral and Qwen2 have no line for it."""
    if family == "qwen2":
        return "qkv"
    return "all" if family == "llama" and config.get("attention_bias", False) else "none"


def _window_faults(config: Mapping[str, Any], family: str, max_positions: int) -> list[str]:
    """A window that hides positions from some layer; one as long as the longest sequence hides none."""
    window = config.get("sliding_window", _DEFAULTS[family][2])
    if family == "qwen2":
        sliding_layers = config["num_hidden_layers"] - config.get("max_window_layers", 28)
        layer_types = config.get("layer_types") or ["sliding_attention"] * sliding_layers
        if not config.get("use_sliding_window", False) or "sliding_attention" not in layer_types:
            return []
    if window is None or window >= max_positions:
        return []
    return [
        f"sliding_window = {window}: our llama attends to all of max_position_embeddings = {max_positions} positions;"
        f" for sequences of up to {window}, where a window hides nothing, set max_position_embeddings to {window}"
    ]
