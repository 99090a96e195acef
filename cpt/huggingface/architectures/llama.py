"""Llama in Hugging Face's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpt.config.faults import Fault
from cpt.models.llama import Settings

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"

_OUTSIDE_BLOCKS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# Begin with blocks.N. on our side, with model.layers.N. on theirs.
_IN_A_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
# Lines that may be left out.
_NUMBERS = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "initializer_range", "max_position_embeddings",
)  # fmt: skip


def names(settings: Settings) -> dict[str, str]:
    """Our name of every parameter -> theirs, in the model's order; a tied head is not among them."""
    theirs = {}
    for ours in settings.shapes:
        if ours.startswith("blocks."):
            _, index, rest = ours.split(".", 2)
            theirs[ours] = f"model.layers.{index}.{_IN_A_BLOCK[rest]}"
        else:
            theirs[ours] = _OUTSIDE_BLOCKS[ours]
    return theirs


def tied_names(settings: Settings) -> dict[str, str]:
    """Tensors of theirs that a tied model may hold a second time -> the tensor that they repeat."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if settings.tied else {}


def is_no_weight(name: str) -> bool:
    """Rotary frequencies, which files of 2023 hold as buffers."""
    return name.endswith(".rotary_emb.inv_freq")


def config_of(settings: Settings) -> dict[str, Any]:
    """The lines of config.json that say the model's shape."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.width,
        "intermediate_size": settings.width_of_mlp,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.width_of_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": settings.longest_sequence,
        "initializer_range": settings.initial_std,
        "rms_norm_eps": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied,
        # Twice: readers of before transformers 5 know only the first, and take 10000 where it is missing.
        "rope_theta": settings.rope_base,
        "rope_parameters": {"rope_theta": settings.rope_base, "rope_type": "default"},
    }


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """Our settings from a config.json; what it leaves out has the default of transformers' LlamaConfig.

    Raises Fault with every line that our Llama cannot represent, each beginning with `where`.
    """
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    faults = [f"{name} is missing" for name in needed if config.get(name) is None]
    faults += [
        f"{name} = {config[name]!r}: expected a number"
        for name in (*needed, *_NUMBERS)
        if config.get(name) is not None and type(config[name]) not in (int, float)
    ]
    faults += _what_we_cannot_do(config)
    rope_base, rope_faults = _rope_base(config)
    faults += rope_faults
    if not faults:
        settings = Settings(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads"),
            head_width=config.get("head_dim"),
            mlp_width=config["intermediate_size"],
            rope_base=rope_base,
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            initial_std=config.get("initializer_range", 0.02),
            longest_sequence=config.get("max_position_embeddings", 2048),
        )
        faults = settings.faults()
    if faults:
        raise Fault(f"{where}: {line}" for line in faults)
    return settings


def _what_we_cannot_do(config: Mapping[str, Any]) -> list[str]:
    can = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    return [
        f"{name} = {config[name]}: our llama has only {name} = {only}"
        for name, only in can.items()
        if config.get(name) is not None and config[name] != only
    ]


def _rope_base(config: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The base and what is wrong with it, from `rope_parameters` (transformers 5) and `rope_theta` (before)."""
    faults = []
    bases = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config["rope_theta"]
    for name in ("rope_parameters", "rope_scaling"):
        parameters = config.get(name) or {}
        rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        if rope_type != "default":
            faults.append(f"{name}: rope_type = {rope_type}: our llama has only default, without scaling")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            faults.append(
                f"{name}: partial_rotary_factor = {parameters['partial_rotary_factor']}: our llama has only 1"
            )
        if parameters.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = parameters["rope_theta"]
    if len(set(bases.values())) > 1:
        faults.append(" but ".join(f"{name} = {base}" for name, base in bases.items()) + ": they must be equal")
    return float(next(iter(bases.values()), 10000.0)), faults
