"""A whole training step made in several ways: our engine as `cpt train` builds it, and others' models.

All begin with the same weights and see the same windows, under the same DeepSpeed settings with AdamW in torch's fused
form unless a way says otherwise; the loss of the first step is therefore the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from cpt.benchmarks import machine
from cpt.benchmarks.models import MODELS
from cpt.config import build, name_of_choice
from cpt.engine import Engine
from cpt.engine.settings import Batch, Optimizer, deepspeed_settings
from cpt.engine.settings import Settings as EngineSettings
from cpt.huggingface import architectures
from cpt.huggingface.forward import names_in_memory
from cpt.models.layers import compiled, recompute
from cpt.models.layers.blocks import prepare_blocks
from cpt.parallel.mesh import Mesh
from cpt.progress import Progress
from cpt_kernels import switch

_RATE, _SEED = 1e-5, 1
# A step as `next(step)` makes it; gives its loss in nats a token.
Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A model and the batch of a step: `windows` of `positions` tokens, `micro_batch` of them at once."""

    model: str
    positions: int
    windows: int
    micro_batch: int
    precision: str
    zero: int = 1

    @property
    def settings(self) -> Any:
        """The model's shape, long enough for the windows."""
        model = MODELS[self.model]
        return dataclasses.replace(model, longest_sequence=max(model.longest_sequence, self.positions))

    @property
    def tokens_a_step(self) -> int:
        """All windows together."""
        return self.windows * self.positions

    @property
    def engine_settings(self) -> EngineSettings:
        """What our engine is given, and of which the settings for DeepSpeed are made for everyone."""
        return EngineSettings(self.precision, self.zero, Batch(self.windows, self.micro_batch), Optimizer(), {})


@dataclass(frozen=True)
class Way:
    """`make(case, mesh)` gives the step. `package`: what has to be installed. `on`: the only kind of device."""

    make: Callable[[Case, Mesh], Step]
    package: str = "torch"
    on: str | None = None


def batches(case: Case) -> Iterable[Tensor]:
    """Windows [B, S + 1] of random tokens for one step after the other; the same for every way."""
    numbers, vocabulary = torch.Generator().manual_seed(_SEED), MODELS[case.model].vocabulary
    while True:
        yield torch.randint(vocabulary, (case.windows, case.positions + 1), generator=numbers)


def ours(case: Case, mesh: Mesh, chosen: switch.Settings, compiles: bool = False, is_marked: bool = False) -> Step:
    """Our engine with these twins. `is_marked`: operations and update tell a profiler who they are."""
    kernels = switch.choose(chosen, mesh.device)
    if is_marked:
        kernels = _marked(kernels)
    model = build(case.settings, "Model", kernels)
    prepare_blocks(model, recompute.Settings(), compiled.Settings(blocks=compiles))
    optimizer = Optimizer()
    engine = Engine(
        model,
        case.engine_settings,
        mesh,
        [],
        lambda groups: kernels.adamw(groups, 0.0, (optimizer.beta1, optimizer.beta2), optimizer.epsilon),
        decays=model.decays,
    )
    engine.fill(lambda name, start, stop: model.initial_value(name, _SEED).reshape(-1)[start:stop], check=False)
    if is_marked:
        engine._update = _named("optimiser", engine._update)
    source, windows = torch.zeros(case.windows, dtype=torch.int64), iter(batches(case))
    done = 0

    def step() -> float:
        nonlocal done
        progress = Progress(step=done, stage_step=done)
        done += 1
        return engine.step(next(windows), source, 1, _RATE, progress).loss

    return step


def _marked(kernels: switch.Kernels) -> switch.Kernels:
    """The same functions, each under its own name in a profile."""
    marked = {
        field.name: _named(field.name, getattr(kernels, field.name))
        for field in dataclasses.fields(kernels)
        if field.name not in ("told", "adamw") and callable(getattr(kernels, field.name))
    }
    return dataclasses.replace(kernels, **marked)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **words: Any) -> Any:
        with record_function(f"cpt:{name}"):
            return function(*arguments, **words)

    return called


def transformers(case: Case, mesh: Mesh) -> Step:
    """transformers' own model, with its own loss and scaled_dot_product_attention, under DeepSpeed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = case.settings
    architecture = architectures.of_model(name_of_choice(settings))
    lines = dict(architecture.config_of(settings))
    config = AutoConfig.for_model(lines.pop("model_type"), **{**lines, "use_cache": False})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    _fill(model, settings, architecture.tensors(settings))

    def loss_of(engine: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return engine(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss

    return _under_deepspeed(model, case, mesh, loss_of)


def _fill(model: nn.Module, settings: Any, tensors: dict[str, Any]) -> None:
    """Their weights from our initial values."""
    with torch.device("meta"):
        own = build(settings, "Model", switch.choose(switch.Settings(all="plain"), torch.device("cpu")))
    inside = names_in_memory(model, tensors)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, stored in tensors.items():
            parts = [own.initial_value(part, _SEED) for part in stored.ours]
            parameters[inside[name]].copy_(stored.join(parts))


def _under_deepspeed(
    model: nn.Module, case: Case, mesh: Mesh, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Step:
    """Steps of a model that is not ours: the plain loop over micro-batches that DeepSpeed asks for."""
    import deepspeed

    optimizer = Optimizer()
    decaying = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decaying, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups, lr=_RATE, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon, fused=True
    )
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=adamw, config=deepspeed_settings(case.engine_settings, 1)
        )
    windows = iter(batches(case))

    def step() -> float:
        losses = []
        for micro_batch in next(windows).split(case.micro_batch):
            tokens = micro_batch.to(mesh.device, non_blocking=True)
            loss = loss_of(engine, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    return step


def litgpt(case: Case, mesh: Mesh) -> Step:
    """litgpt's model under DeepSpeed; its weights are its own, and its head is never tied."""
    from litgpt import GPT, Config
    from torch.nn import functional

    shape = case.settings
    of_llama = {"bias": False, "parallel_residual": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}
    config = Config(
        block_size=case.positions,
        vocab_size=shape.vocabulary,
        padded_vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_query_groups=shape.num_kv_heads,
        head_size=shape.width_of_head,
        intermediate_size=shape.width_of_mlp,
        rotary_percentage=shape.rotary_width / shape.width_of_head,
        **(of_llama if name_of_choice(shape) == "llama" else {}),
    )
    model = GPT(config)
    torch.manual_seed(_SEED)
    model.apply(model._init_weights)

    def loss_of(engine: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(engine(inputs).flatten(0, 1).float(), targets.flatten())

    return _under_deepspeed(model, case, mesh, loss_of)


def nanotron(case: Case, mesh: Mesh) -> Step:
    """Not made here: its models run in its own trainer only."""
    raise ValueError("its models run in its own trainer only, which is not started from here")


# The first is what all others are compared with.
WAYS: dict[str, Way] = {
    "transformers": Way(transformers, "transformers"),
    "ours": Way(lambda case, mesh: ours(case, mesh, switch.Settings())),
    "ours, plain twins": Way(lambda case, mesh: ours(case, mesh, switch.Settings(all="plain"))),
    "ours, Triton's twins": Way(lambda case, mesh: ours(case, mesh, switch.Settings(all="triton")), "triton", "cuda"),
    "ours, compiled blocks": Way(lambda case, mesh: ours(case, mesh, switch.Settings(), compiles=True)),
    "litgpt": Way(litgpt, "litgpt"),
    "nanotron": Way(nanotron, "nanotron"),
}
PROFILED = Way(lambda case, mesh: ours(case, mesh, switch.Settings(), is_marked=True))


def why_absent(way: Way, device: torch.device) -> str | None:
    """Why it takes no part here."""
    if way.on not in (None, device.type):
        return "needs a GPU"
    return None if machine.versions(way.package) else "not installed"
