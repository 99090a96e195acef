"""Our models against transformers' own classes: logits, losses and every gradient, with random weights at odd sizes.

As a program it prints the table of docs/PARITY.md:  python tests/harness/cpt_harness/parity.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cpt.config import build, name_of_choice
from cpt.huggingface import architectures
from cpt.models import llama, pythia
from cpt.models.rope_scaling import dynamic, linear, llama3, yarn
from cpt_kernels import Settings as KernelSettings
from cpt_kernels import choose

CPU = torch.device("cpu")
AUTO = KernelSettings()
POSITIONS = 37

_LLAMA = llama.Settings(
    vocabulary=131, width=48, layers=2, heads=6, kv_heads=2, mlp_width=88, rope_base=500.0, norm_epsilon=1e-4,
    initial_std=0.2, longest_sequence=64,
)  # fmt: skip
_PYTHIA = pythia.Settings(
    vocabulary=131, width=60, layers=2, heads=5, mlp_width=88, rotary_share=0.5, rope_base=500.0, norm_epsilon=1e-4,
    initial_std=0.2, longest_sequence=64,
)  # fmt: skip
# All scalings at 37 positions of which 16 are the original ones.
_SCALINGS = {
    "linear": linear.Settings(3.0),
    "dynamic": dynamic.Settings(4.0, 16),
    "llama3": llama3.Settings(4.0, 16, 0.5, 2.0),
    "yarn": yarn.Settings(4.0, 16, fast_turns=2.0, slow_turns=0.1),
    "yarn, told in full": yarn.Settings(4.0, 16, fast_turns=2.5, slow_turns=0.2, amplitude=1.1, rounded=False),
}

LLAMAS = {
    "grouped heads": _LLAMA,
    "one head for all": replace(_LLAMA, kv_heads=1),
    "as many heads": replace(_LLAMA, kv_heads=None),
    "an odd number of heads": replace(_LLAMA, width=42, heads=3, kv_heads=3),
    "tied": replace(_LLAMA, tied=True),
    "wide heads": replace(_LLAMA, head_width=14),
    "all biases": replace(_LLAMA, attention_bias="all", mlp_bias=True),
    "Qwen2": replace(_LLAMA, attention_bias="qkv", tied=True),
    "Qwen2, wide heads": replace(_LLAMA, attention_bias="qkv", head_width=14),
    **{f"rope {kind}": replace(_LLAMA, rope_scaling=scaling) for kind, scaling in _SCALINGS.items()},
}
PYTHIAS = {
    "parallel": _PYTHIA,
    "sequential": replace(_PYTHIA, has_parallel_residual=False),
    "tied": replace(_PYTHIA, tied=True),
    "no attention biases": replace(_PYTHIA, attention_bias=False),
    "GELU by tanh": replace(_PYTHIA, activation="gelu_tanh"),
    "SiLU": replace(_PYTHIA, activation="silu"),
    "a sixth turned": replace(_PYTHIA, rotary_share=0.17),
    "all turned": replace(_PYTHIA, rotary_share=1.0),
    **{f"rope {kind}": replace(_PYTHIA, rope_scaling=scaling) for kind, scaling in _SCALINGS.items()},
}
VARIANTS: dict[str, Any] = {
    **{f"llama: {name}": settings for name, settings in LLAMAS.items()},
    **{f"pythia: {name}": settings for name, settings in PYTHIAS.items()},
}


def build_model(settings: Any, kernels: KernelSettings = AUTO, seed: int = 1) -> nn.Module:
    """Our model; no norm is exactly 1 and no bias 0, which would hide that it is not applied."""
    model = build(settings, "Model", choose(kernels, CPU))
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
            elif not model.decays(name):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def tokens_of(settings: Any, windows: int = 3, positions: int = POSITIONS) -> Tensor:
    """The same random tokens [windows, positions + 1] every time."""
    return torch.randint(settings.vocabulary, (windows, positions + 1), generator=torch.Generator().manual_seed(2))


def our_results(model: nn.Module) -> dict[str, Tensor]:
    """Logits, losses and the gradient of every parameter."""
    window = tokens_of(model.settings)
    losses = model(window[:, :-1], window[:, 1:])
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": model(window[:, :-1]), "losses": losses, **gradients}


def their_results(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of transformers' model with the weights of ours, computing in `dtype`, under our names."""
    theirs, window = their_twin(model, dtype), tokens_of(model.settings)
    logits = theirs(input_ids=window[:, :-1]).logits
    losses = nn.functional.cross_entropy(logits.float().mT, window[:, 1:], reduction="none")
    losses.mean().backward()
    gradients = {}
    for name, stored in _tensors(model.settings).items():
        gradients.update(zip(stored.ours, stored.split(theirs.get_parameter(_in_memory(name)).grad), strict=True))
    return {"logits": logits, "losses": losses, **gradients}


def their_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """transformers' model made of the lines that we write into config.json, with the weights of ours."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    architecture = architectures.of_model(name_of_choice(model.settings))
    config = architecture.config_of(model.settings)
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**config), dtype=torch.float32)
    assert type(theirs).__name__ == config["architectures"][0]
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {
        _in_memory(name): stored.join([parts[ours] for ours in stored.ours])
        for name, stored in _tensors(model.settings).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == set(map(_in_memory, architecture.tied_names(model.settings)))
    theirs.to(dtype)
    rotary = theirs.base_model.rotary_emb
    theirs.base_model.rotary_emb = type(rotary)(theirs.config)  # `to` has rounded its angles
    return theirs


def _tensors(settings: Any) -> dict[str, architectures.Stored]:
    return architectures.of_model(name_of_choice(settings)).tensors(settings)


def _in_memory(name: str) -> str:
    """transformers 5 calls GPT-NeoX's head `lm_head` in memory and `embed_out` in files."""
    return name.replace("embed_out.", "lm_head.")


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each, relative to its largest entry."""
    assert got.keys() == expected.keys()
    errors = {}
    for name, exact in expected.items():
        assert got[name].shape == exact.shape
        difference = got[name].detach().float() - exact.detach().float()
        errors[name] = (difference.abs().max() / exact.detach().abs().max()).item()
    return errors


def split_errors(errors: dict[str, float]) -> tuple[float, float, float]:
    """Error of the logits, of the losses, and the largest of the gradients."""
    gradients = (error for name, error in errors.items() if name not in ("logits", "losses"))
    return errors["logits"], errors["losses"], max(gradients)


def table() -> str:
    """A markdown table: ours against transformers in fp32; in bf16 both against transformers in fp32."""
    lines = ["| variant | dtype | logits | losses | gradients | transformers itself: logits, losses, gradients |"]
    lines.append("|---|---|---|---|---|---|")
    for variant, settings in VARIANTS.items():
        model = build_model(settings)
        ours = split_errors(relative_errors(our_results(model), their_results(model, torch.float32)))
        lines.append(f"| {variant} | fp32 | " + " | ".join(f"{error:.1e}" for error in ours) + " | |")
        model = build_model(settings).bfloat16()
        exact = their_results(model, torch.float32)
        ours = split_errors(relative_errors(our_results(model), exact))
        theirs = split_errors(relative_errors(their_results(model, torch.bfloat16), exact))
        lines.append(
            f"| {variant} | bf16 | "
            + " | ".join(f"{error:.1e}" for error in ours)
            + " | "
            + ", ".join(f"{error:.1e}" for error in theirs)
            + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(table())
