"""GPT-NeoX in Hugging Face's words.

Its files hold query, key and value as one tensor, head by head: the rows of a head's query, of its key, of its value,
then those of the next head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpt.config.faults import Fault
from cpt.huggingface.architectures import _rope
from cpt.huggingface.architectures._lines import flags, no_numbers, other_than, told
from cpt.huggingface.architectures._stored import Stored, stored_by_tables
from cpt.models.pythia import Settings

ARCHITECTURES = {"GPTNeoXForCausalLM": "gpt_neox"}

_OUTSIDE_BLOCKS = {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
# Begin with blocks.N. on our side, with gpt_neox.layers.N. on theirs.
_IN_A_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "attention.query_key_value",
    "attention.key": "attention.query_key_value",
    "attention.value": "attention.query_key_value",
    "attention.output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
# Their activations -> ours. Of the approximations by tanh there are three, which differ in rounding only.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# Lines that may be left out.
_NUMBERS = ("intermediate_size", "layer_norm_eps", "initializer_range", "max_position_embeddings", "rotary_pct")
_FLAGS = ("attention_bias", "use_parallel_residual", "tie_word_embeddings")


def tensors(settings: Settings) -> dict[str, Stored]:
    """Their name of every tensor -> the parameters of ours in it, in order; a tied head is not among them."""
    return stored_by_tables(settings.shapes, _OUTSIDE_BLOCKS, _IN_A_BLOCK, "gpt_neox.layers", settings.width_of_head)


def tied_names(settings: Settings) -> dict[str, str]:
    """Tensors of theirs that a tied model may hold a second time -> the tensor that they repeat."""
    return {"embed_out.weight": "gpt_neox.embed_in.weight"} if settings.tied else {}


def is_no_weight(name: str) -> bool:
    """Masks and rotary frequencies, which files of before 2024 hold as buffers."""
    return name.endswith((".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"))


def config_of(settings: Settings) -> dict[str, Any]:
    """The lines of config.json that say the model's shape; Fault for RMSNorm, and for an MLP without biases."""
    faults = [] if settings.norm == "layer_norm" else [f"model.norm = {settings.norm}: transformers' GPT-NeoX has none"]
    if not settings.mlp_bias:
        faults.append("model.mlp_bias = false: transformers' GPT-NeoX has no feed-forward layer without biases")
    if faults:
        raise Fault(f"{fault}; there is no Hugging Face form of this model" for fault in faults)
    ((architecture, model_type),) = ARCHITECTURES.items()
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.width_of_mlp,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "hidden_act": "gelu_pytorch_tanh" if settings.activation == "gelu_tanh" else settings.activation,
        "attention_bias": settings.attention_bias,
        "use_parallel_residual": settings.has_parallel_residual,
        "max_position_embeddings": _rope.longest_of(settings),
        "initializer_range": settings.std_of("embedding.weight"),
        "layer_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied,
        # Twice: readers of before transformers 5 know only these two, and take others where they are missing.
        "rotary_pct": settings.rotary_share,
        "rotary_emb_base": settings.rope_base,
        **_rope.lines_of(settings, {"partial_rotary_factor": settings.rotary_share}),
    }


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """Our settings from a config.json; what it leaves out has the default of transformers' GPTNeoXConfig.

    Raises Fault with every line that our model cannot represent, each beginning with `where`.
    """
    faults = no_numbers(config, _NEEDED, _NUMBERS) + flags(config, _FLAGS)
    faults += other_than(config, {"quantization_config": None}, "pythia")
    activation = told(config, "hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        faults.append(f"hidden_act = {activation}: our pythia has {', '.join(_ACTIVATIONS)}")
    max_positions = told(config, "max_position_embeddings", 2048)
    rope_base, base_faults = _rope.base_of(config, "rotary_emb_base")
    rotary_share, share_faults = _rope.share_of(config, ("rotary_pct",), 0.25)
    rope_scaling, scaling_faults = _rope.scaling_of(config, max_positions)
    faults += base_faults + share_faults + scaling_faults
    if not faults:
        settings = Settings(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=told(config, "intermediate_size", 24576),
            has_parallel_residual=config.get("use_parallel_residual", True),
            activation=_ACTIVATIONS[activation],
            attention_bias=config.get("attention_bias", True),
            rotary_share=rotary_share,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            norm_epsilon=told(config, "layer_norm_eps", 1e-5),
            tied=config.get("tie_word_embeddings", False),
            initial_std=told(config, "initializer_range", 0.02),
            longest_sequence=_rope.longest_with(rope_scaling, max_positions),
        )
        faults = settings.faults()
    if faults:
        raise Fault(f"{where}: {line}" for line in faults)
    return settings
