"""Rotary positions in Hugging Face's words: a base, and perhaps a scaling with names of its own.

Since transformers 5 both stand in `rope_parameters`; before, the base was `rope_theta` (`rotary_emb_base` in GPT-NeoX)
and the scaling `rope_scaling`. We read either, refuse a config in which both stand and differ, and write both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cpt.config import Fault, name_of_choice, read_settings
from cpt.config.choices import settings_of_choice
from cpt.huggingface.architectures._lines import is_number, not_numbers

_SCALINGS = "cpt.models.rope_scaling"
# Their names of our settings; `rope_type` itself is the name of our choice.
_THEIR_NAMES = {
    "linear": {"factor": "factor"},
    # The original length of `dynamic` is max_position_embeddings itself.
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "fast_turns": "beta_fast",
        "slow_turns": "beta_slow",
        "amplitude": "attention_factor",
        "rounded": "truncate",
    },
}


def lines_of(settings: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, with `more` in it, and for readers of before transformers 5 `rope_scaling` if there is one."""
    scaling = settings.rope_scaling
    if scaling is None:
        return {"rope_parameters": {"rope_theta": settings.rope_base, "rope_type": "default", **more}}
    kind = name_of_choice(scaling)
    told = {theirs: getattr(scaling, ours) for ours, theirs in _THEIR_NAMES[kind].items()}
    told = {"rope_type": kind, **{name: value for name, value in told.items() if value is not None}}
    return {"rope_parameters": {"rope_theta": settings.rope_base, **told, **more}, "rope_scaling": told}


def longest_of(settings: Any) -> int:
    """`max_position_embeddings`: the longest sequence, or what `dynamic` takes for the original length."""
    scaling = settings.rope_scaling
    is_dynamic = scaling is not None and name_of_choice(scaling) == "dynamic"
    return scaling.original_length if is_dynamic else settings.longest_sequence


def longest_with(scaling: Any | None, max_positions: int) -> int:
    """The other way. `dynamic` is meant for sequences of up to its factor times the original length."""
    is_dynamic = scaling is not None and name_of_choice(scaling) == "dynamic"
    return int(scaling.factor * max_positions) if is_dynamic else max_positions


def base_of(config: Mapping[str, Any], old_name: str) -> tuple[float, list[str]]:
    """The base and what is wrong with it; `old_name` is where configs of before transformers 5 have it."""
    bases = {}
    if config.get(old_name) is not None:
        bases[old_name] = config[old_name]
    for name in ("rope_parameters", "rope_scaling"):
        if (base := _mapping(config, name).get("rope_theta")) is not None:
            bases[f"{name}.rope_theta"] = base
    faults = _unreadable(config) + _unequal(bases) + not_numbers(bases)
    return (10000.0 if faults or not bases else float(next(iter(bases.values())))), faults


def share_of(config: Mapping[str, Any], old_names: tuple[str, ...], otherwise: float) -> tuple[float, list[str]]:
    """The part of each head that is turned, and what is wrong with it."""
    shares = {name: config[name] for name in old_names if config.get(name) is not None}
    for name in ("rope_parameters", "rope_scaling"):
        if (share := _mapping(config, name).get("partial_rotary_factor")) is not None:
            shares[f"{name}.partial_rotary_factor"] = share
    return next(iter(shares.values()), otherwise), _unequal(shares) + not_numbers(shares)


def scaling_of(config: Mapping[str, Any], max_positions: int) -> tuple[Any | None, list[str]]:
    """Our settings of the scaling that config.json names, None without; and what is wrong with it."""
    told = {}
    for name in ("rope_parameters", "rope_scaling"):
        parameters = {key: value for key, value in _mapping(config, name).items() if value is not None}
        kind = parameters.pop("rope_type", parameters.pop("type", "default"))
        ignored = ("type", "rope_theta", "partial_rotary_factor")
        if kind != "default":
            told[name] = (kind, {key: value for key, value in parameters.items() if key not in ignored})
    if not told:
        return None, []
    faults = _unequal(told)
    where, (kind, parameters) = next(iter(told.items()))
    if kind not in _THEIR_NAMES:
        return None, [*faults, f"{where}: rope_type = {kind}: we have default, {', '.join(_THEIR_NAMES)}"]
    if kind in ("llama3", "yarn"):
        parameters.setdefault("original_max_position_embeddings", max_positions)
    if kind == "yarn":
        parameters = _with_amplitude(parameters)
    our_names = {theirs: ours for ours, theirs in _THEIR_NAMES[kind].items()}
    unknown = [f"{where}: {key} = {parameters[key]}: {kind} has no such line" for key in parameters.keys() - our_names]
    if faults or unknown:
        return None, faults + sorted(unknown)
    ours = {our_names[theirs]: value for theirs, value in parameters.items()}
    if kind == "dynamic":
        ours["original_length"] = max_positions
    try:
        return read_settings(settings_of_choice(_SCALINGS, kind), ours, where), []
    except Fault as fault:
        return None, [_in_their_words(line, where, kind) for line in fault.lines]


def _in_their_words(line: str, where: str, kind: str) -> str:
    for ours, theirs in _THEIR_NAMES[kind].items():
        line = line.replace(f"{where}.{ours} ", f"{where}.{theirs} ")
    return line


def _with_amplitude(parameters: dict[str, Any]) -> dict[str, Any]:
    """YaRN's `mscale` and `mscale_all_dim` are two ways to say one number, `attention_factor`; as DeepSeek has them."""
    above, below = (parameters.pop(name, None) for name in ("mscale", "mscale_all_dim"))
    factor = parameters.get("factor")
    if above and below and "attention_factor" not in parameters and all(map(is_number, (above, below, factor))):
        logarithm = 0.1 * math.log(max(factor, 1))
        parameters["attention_factor"] = (above * logarithm + 1) / (below * logarithm + 1)
    return parameters


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _unreadable(config: Mapping[str, Any]) -> list[str]:
    """Lines that are no names and values, or that have some for each kind of layer."""
    faults = []
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            faults.append(f"{name} = {config[name]!r}: expected names and values")
        nested = [key for key, value in _mapping(config, name).items() if isinstance(value, Mapping)]
        faults += [f"{name}.{key}: our models have one rotary position for all layers" for key in nested]
    return faults


def _unequal(told: Mapping[str, Any]) -> list[str]:
    values = list(told.values())
    if all(value == values[0] for value in values):
        return []
    return [" but ".join(f"{name} = {value}" for name, value in told.items()) + ": they must be equal"]
