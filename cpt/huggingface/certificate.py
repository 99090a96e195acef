"""The certificate: proof that an exported folder is the trained model, or a Fault that names what differs.

Three questions, each of which can fail alone:
    the shape      does config.json on disk say what the trained model is (rotary base and ties among it)?
    the tensors    is each one, as read back from disk, the trained weight cast to the exported type, bit for bit?
    the function   does transformers, given nothing but the folder, compute the same logits and loss on a probe?
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import cpt
from cpt.config.faults import Fault
from cpt.huggingface import architectures
from cpt.huggingface.export import Weight, cast, fetch, name_of_dtype, told_as_fault, write_json
from cpt.huggingface.load import hashes_of_tokenizer, read_folder
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

LARGEST_LOSS_DIFFERENCE = 1e-3
# Of the largest logit. Measured: two correct fp32 forwards differ by 1e-6 of it; with a rotary base 10 % off, by
# 0.3, and still by 2e-4 in a small model that has learned nothing.
LARGEST_LOGIT_DIFFERENCE = 1e-4


def certify(
    weights: Mapping[str, Weight],
    model_name: str,
    settings: Any,
    folder: Path,
    probe_tokens: Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write `certificate.json` into `folder`, and return what it says.

    weights: the trained ones by our names, in their own type. probe_tokens [N, S + 1] int64: windows of text.
    Both models compute in fp32, so that a difference comes from a fault and not from rounding; the trained weights are
    first rounded to `dtype`, and what that rounding alone costs in loss is told beside it.

    Raises Fault at the first thing that differs; there is no certificate then.
    """
    tensors = _compare_stored(weights, model_name, settings, folder, dtype)
    certificate = {
        "certificate": 1,
        "model": model_name,
        "architecture": architectures.of_model(model_name).ARCHITECTURE,
        "dtype": name_of_dtype(dtype),
        "parameters": settings.num_parameters,
        "tied": settings.tied,
        "rows_removed": 0,
        "rope": architectures.of_model(model_name).config_of(settings)["rope_parameters"],
        "tensors": tensors,
        "tokenizer": hashes_of_tokenizer(folder),
        "probe": _compare_on_probe(weights, model_name, settings, folder, probe_tokens, dtype),
        "versions": _versions(),
    }
    with told_as_fault(folder):
        write_json(folder / "certificate.json", certificate)
    return certificate


def _compare_stored(
    weights: Mapping[str, Weight], model_name: str, settings: Any, folder: Path, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Their name of each tensor -> our name, shape and hash; Fault if config.json or a tensor differs."""
    architecture = architectures.of_model(model_name)
    stored_name, stored_settings, stored = read_folder(folder)
    trained_lines = architecture.config_of(settings)
    stored_lines = architectures.of_model(stored_name).config_of(stored_settings)
    for line, value in trained_lines.items():
        if stored_lines.get(line) != value:
            raise Fault(f"{folder}: config.json says {line} = {stored_lines.get(line)}; the trained model has {value}")
    names = architecture.names(settings)
    if set(weights) != set(names):
        strange = min(set(weights) ^ set(names))
        raise Fault(f"{folder}: weight {strange} is in the trained model or in the folder, not in both")
    tensors = {}
    for ours, theirs in names.items():
        expected, found = cast(ours, fetch(weights, ours), settings.shapes[ours], dtype), stored[ours]
        difference = describe_difference(expected, found)
        if difference:
            raise Fault(f"{folder}: tensor {theirs} is not the trained {ours}: {difference}")
        tensors[theirs] = {"from": ours, "shape": list(found.shape), "sha256": sha256_of(found)}
    return tensors


def describe_difference(expected: Tensor, found: Tensor) -> str:
    """What differs between two tensors, to the bit, in a few words; empty if nothing does."""
    if expected.shape != found.shape:
        return f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{name_of_dtype(found.dtype)} in place of {name_of_dtype(expected.dtype)}"
    differs = (_bits(expected) != _bits(found)).view(*expected.shape, -1).any(dim=-1)
    if not differs.any():
        return ""
    first = tuple(differs.nonzero()[0].tolist())
    return (
        f"{int(differs.sum())} of {differs.numel()} values differ, the first at {list(first)}:"
        f" {found[first].item():.6g} in place of {expected[first].item():.6g}"
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def sha256_of(tensor: Tensor) -> str:
    """Hash of the tensor's bytes as they lie in the file."""
    return hashlib.sha256(_bits(tensor).numpy()).hexdigest()


def _compare_on_probe(
    weights: Mapping[str, Weight],
    model_name: str,
    settings: Any,
    folder: Path,
    probe_tokens: Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    kernels = choose(KernelSettings(all="plain"), torch.device("cpu"))
    # fork_rng: a run that goes on afterwards draws as if this had not been.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        theirs = _load_with_transformers(folder)
        ours = importlib.import_module(f"cpt.models.{model_name}").Model(settings, kernels).eval()
        _fill(ours, weights, torch.float32)
        loss_trained = sum(ours(window[None, :-1], window[None, 1:]).mean().item() for window in probe_tokens)
        _fill(ours, weights, dtype)
        probe = _compare_models(ours, theirs, probe_tokens)
    probe = {
        "windows": len(probe_tokens),
        "tokens": probe_tokens[:, 1:].numel(),
        "sha256": sha256_of(probe_tokens),
        "loss_trained": loss_trained / len(probe_tokens),
        **probe,
    }
    _judge(probe, folder)
    return probe


def _load_with_transformers(folder: Path) -> torch.nn.Module:
    """The folder's model in fp32, from nothing but the folder; Fault if transformers misses or refuses a tensor."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    had_progress_bar = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if had_progress_bar:
        their_logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[kind]:
            raise Fault(f"{folder}: transformers reports {kind.replace('_', ' ')}: {min(map(str, told[kind]))}")
    return model.eval()


def _fill(model: torch.nn.Module, weights: Mapping[str, Weight], dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(fetch(weights, name).to(dtype))


def _compare_models(ours: torch.nn.Module, theirs: torch.nn.Module, probe_tokens: Tensor) -> dict[str, Any]:
    """Both losses, the largest difference of logits and how often both prefer the same token; a window at a time."""
    losses, num_agreeing, difference, largest = [0.0, 0.0], 0, 0.0, 0.0
    for window in probe_tokens:
        both = [ours(window[None, :-1])[0], theirs(input_ids=window[None, :-1]).logits[0]]  # [S, V] each
        for index, logits in enumerate(both):
            losses[index] += functional.cross_entropy(logits, window[1:]).item() / len(probe_tokens)
        num_agreeing += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        difference = _larger(difference, (both[0] - both[1]).abs().max().item())
        largest = _larger(largest, both[0].abs().max().item())
    return {
        "loss_trained_rounded": losses[0],
        "loss_transformers": losses[1],
        "loss_difference": abs(losses[1] - losses[0]),
        "largest_logit": largest,
        "largest_logit_difference": difference,
        "top_1_agreement": num_agreeing / probe_tokens[:, 1:].numel(),
    }


def _larger(one: float, other: float) -> float:
    """The larger; NaN if either is, which `max` would lose."""
    return other if math.isnan(other) or other > one else one


def _judge(probe: Mapping[str, Any], folder: Path) -> None:
    # Written so that NaN fails.
    limit = LARGEST_LOGIT_DIFFERENCE * probe["largest_logit"]
    if not probe["largest_logit_difference"] <= limit:
        raise Fault(
            f"{folder}: transformers computes other logits than the trained model: they differ by up to"
            f" {probe['largest_logit_difference']:.3g}, allowed {limit:.3g}; the tensors are equal, the models are not"
        )
    if not probe["loss_difference"] <= LARGEST_LOSS_DIFFERENCE:
        raise Fault(
            f"{folder}: loss under transformers is {probe['loss_transformers']:.6f}, of the trained model"
            f" {probe['loss_trained_rounded']:.6f}; allowed difference {LARGEST_LOSS_DIFFERENCE}"
        )


def _versions() -> dict[str, str]:
    import transformers

    return {"cpt": cpt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
