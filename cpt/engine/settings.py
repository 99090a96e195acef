"""How one optimiser step is made: batch, precision, optimiser, ZeRO, and DeepSpeed's own settings passed through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cpt.engine import loss_scale
from cpt.engine.deepspeed_block import contradictions


@dataclass(frozen=True)
class Batch:
    """`windows` a step over all ranks together; `micro_batch` at once on one rank (None: as many as there are)."""

    windows: int = 64
    micro_batch: int | None = None

    def faults(self) -> list[str]:
        """Counts below one."""
        named = {"windows": self.windows, "micro_batch": self.micro_batch}
        return [f"{name} = {value}: at least 1" for name, value in named.items() if value is not None and value < 1]

    def windows_a_rank(self, num_ranks: int) -> int:
        """Windows of a step on each of `num_ranks`."""
        return self.windows // num_ranks

    def micro_batch_on(self, num_ranks: int) -> int:
        """Windows of one forward pass on one of `num_ranks`."""
        return self.micro_batch or self.windows_a_rank(num_ranks)

    def faults_on(self, num_ranks: int) -> list[str]:
        """Why a step cannot be cut evenly over `num_ranks`, with values that would do."""
        if self.windows % num_ranks:
            unit = num_ranks * (self.micro_batch or 1)
            below = self.windows // unit * unit
            fitting = [below, below + unit] if below else [unit]
            return [
                f"batch.windows = {self.windows} cannot be cut over {num_ranks} ranks; "
                f"use {' or '.join(map(str, fitting))}"
            ]
        here = self.windows_a_rank(num_ranks)
        if here % self.micro_batch_on(num_ranks):
            fitting = [n for n in range(1, here + 1) if here % n == 0]
            return [
                f"batch.micro_batch = {self.micro_batch} does not divide the {here} windows a rank has in a step; "
                f"use one of {', '.join(map(str, fitting[-8:]))}"
            ]
        return []


@dataclass(frozen=True)
class Optimizer:
    """AdamW, as the Llama and Pythia models were trained with. `clip`: largest gradient norm, 0 for none."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def faults(self) -> list[str]:
        """Values outside AdamW's range."""
        wrong = [
            f"{name} = {getattr(self, name)}: at least 0 and below 1"
            for name in ("beta1", "beta2")
            if not 0 <= getattr(self, name) < 1
        ]
        positive = {"epsilon": self.epsilon > 0, "weight_decay": self.weight_decay >= 0, "clip": self.clip >= 0}
        return wrong + [f"{name} = {getattr(self, name)}: too small" for name, fits in positive.items() if not fits]


@dataclass(frozen=True)
class Settings:
    """`zero`: DeepSpeed's ZeRO stage. `deepspeed`: any of its own settings, passed through where they are not ours."""

    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    zero: Literal[0, 1, 2, 3] = 1
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    loss_scale: loss_scale.Settings = field(default_factory=loss_scale.Settings)

    def faults(self) -> list[str]:
        """What DeepSpeed would get wrong in silence, and where its settings contradict ours."""
        faults = []
        if self.zero == 0 and self.precision != "fp32":
            faults.append(
                f"zero = 0 with precision = {self.precision}: DeepSpeed takes an optimiser step of its own before the "
                "first one and decays the weights; use zero = 1, which costs nothing more, or precision = fp32"
            )
        if self.precision != "fp16" and self.loss_scale != loss_scale.Settings():
            faults.append(f"loss_scale with precision = {self.precision}: only fp16 scales its loss; leave it out")
        return faults + contradictions(self.deepspeed, self.zero)


_FP16 = {"enabled": True, "loss_scale": 1.0}


def deepspeed_settings(settings: Settings, num_ranks: int) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` is given."""
    batch, block = settings.batch, _without_auto(settings.deepspeed)
    zero, types = (block.pop(name, {}) for name in ("zero_optimization", "data_types"))
    micro_batch = batch.micro_batch_on(num_ranks)
    made = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch.windows_a_rank(num_ranks) // micro_batch,
        # At stage 0 DeepSpeed clips without telling the norm; there the engine clips.
        "gradient_clipping": settings.optimizer.clip if settings.zero else 0.0,
        "zero_optimization": {"stage": settings.zero, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **block,
    }
    if settings.precision != "fp32":
        # A fixed scale of 1 is replaced in every step, see loss_scale.py.
        made |= {"bf16": {"enabled": True}} if settings.precision == "bf16" else {"fp16": _FP16}
        types = {"grad_accum_dtype": "fp32", **types}
    return made | ({"data_types": types} if types else {})


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    """What is set in a block and in those inside it; `auto` leaves it to us."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in block.items() if v != "auto"}
